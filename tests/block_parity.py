"""Recorded cases and random requests as arguments of the block loops and of the engine."""

import asyncio
import json
import random
import shutil
from pathlib import Path

import block_loops
import checkpoints
from worker_waits import until

from dilaserve import Options

FIXTURES = Path(__file__).parent / "fixtures"
DREAM_RULES = {"maskgit_plus": "steps", "entropy": "entropy", "topk_margin": "margin"}
SDAR_RULES = {
    "low_confidence_static": "steps",
    "low_confidence_dynamic": "dynamic",
    "sequential": "sequential",
}


def cases(folder):
    """The runs of the authors' decoders in a folder of fixtures; those without a causal context are not served."""
    found = json.loads((FIXTURES / folder / "cases.json").read_text())
    return [
        case
        for case in found
        if case["decoder"] not in ("nemotron_ar", "nemotron_logits") and case.get("causal_context", True)
    ]


def served(folder, directory, rope_override=None):
    """A copy of a fixture that the engine can serve: with a tokenizer, and with the rotation of a case."""
    shutil.copytree(FIXTURES / folder, directory)
    checkpoints.write_tokenizer(directory)
    config = json.loads((directory / "config.json").read_text())
    if rope_override:
        config["rope_parameters"] |= rope_override
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def arguments(case):
    """A recorded case as the name of its loop and the loop's arguments."""
    kind, asked = case["decoder"], dict(prompt=case["prompt"], gen_length=case.get("gen_length"))
    if kind == "dream_original":
        return "dream", asked | dict(steps=case["steps"], alg=case["alg"])
    asked |= dict(block_length=case["block_length"], threshold=case["threshold"])
    if kind.startswith("fast_dllm_v1_dream"):
        return "dream_blocks", asked | dict(cache=kind.split(".")[1])
    if kind == "sdar":
        return "sdar", asked | dict(strategy=case["strategy"], denoising_steps=case["denoising_steps"])
    assert kind == "nemotron_generate"
    return "nemotron", asked | dict(gen_length=case["max_new_tokens"], eos=case["eos_token_id"])


def options(loop, **asked):
    """The engine's options for the arguments of a loop; without an end token it ignores that of the model."""
    found = dict(max_tokens=asked["gen_length"], block_length=asked.get("block_length"))
    if asked.get("threshold") is not None:
        found["confidence_threshold"] = asked["threshold"]
    if loop == "dream":
        found |= dict(cache="none", block_length=asked["gen_length"], num_denoising_steps=asked["steps"])
        found["decode"] = DREAM_RULES[asked["alg"]]
    elif loop == "dream_blocks":
        found["cache"] = asked["cache"]
        if asked.get("steps"):
            found |= dict(num_denoising_steps=asked["steps"], decode=DREAM_RULES[asked["alg"]])
    elif loop == "sdar" and asked["strategy"] == "threshold":
        found["confidence_threshold"] = asked["threshold"]
    elif loop == "sdar":
        found.pop("confidence_threshold", None)
        if asked["strategy"] == "low_confidence_dynamic":
            found["confidence_threshold"] = asked["threshold"]
        found |= dict(num_denoising_steps=asked["denoising_steps"], decode=SDAR_RULES[asked["strategy"]])
    elif loop == "nemotron" and asked.get("threshold") is None:
        found["num_denoising_steps"] = asked.get("steps") or asked["block_length"]
    ends = ends_of(asked)
    return Options(**found, ignore_eos=True, stop_token_ids=tuple(ends), include_stop_str_in_output=bool(ends))


def ends_of(asked):
    """The tokens that end an answer, by the name that each loop has for them."""
    named = asked.get("eos"), asked.get("stop"), *asked.get("stop_ids", ())
    return [token for token in named if token is not None]


def ending(loop, asked, token):
    """The same request with a token that ends its answer."""
    return loop, asked | {"sdar": dict(stop_ids=(token,)), "nemotron": dict(eos=token)}.get(loop, dict(stop=token))


def expected(model, loop, **asked):
    """(tokens, passes) of the reference, which remembers them."""
    known = (loop, json.dumps(asked))
    if known not in model.answers:
        model.answers[known] = decoded(model, loop, **asked)
    return model.answers[known]


def decoded(model, loop, **asked):
    """SDAR's threshold rule is the dynamic one with one token a step."""
    if asked.get("strategy") == "threshold":
        asked |= dict(strategy="low_confidence_dynamic", denoising_steps=asked["block_length"])
    tokens, passes = getattr(block_loops, loop)(model, **asked)
    ends = [tokens.index(token) + 1 for token in ends_of(asked) if token in tokens]
    return tokens[: min([asked["gen_length"], *ends])], passes


def some_requests(architecture, count, seed):
    """Requests of all lengths and rules, as the name of a loop and its arguments."""
    rng, found = random.Random(seed), []
    for i in range(count):
        loop, block, how = SETTINGS[architecture](rng, i)
        length = rng.choice((1, block - 1, block, block + 1, 2 * block, rng.randint(1, 150)))
        prompt = [rng.randrange(256) for _ in range(max(1, length))]
        answer = rng.choice((1, block, block + 3, 2 * block, rng.randint(1, 48)))
        if loop.startswith("dream"):
            answer = max(1, answer // block) * block
        if loop == "dream_blocks" and "steps" in how:
            how["steps"] *= answer // block
        found.append((loop, dict(prompt=prompt, gen_length=answer, **how)))
    return found


def of_dream(rng, i):
    steps = rng.choice((3, 7, 16, 32, 40))
    alg = rng.choice(list(DREAM_RULES))
    if i % 2:
        return "dream", 16, dict(steps=steps, alg=alg)
    block = rng.choice((4, 8, 16))
    how = dict(threshold=rng.choice((0.5, 0.7, 0.9)))
    if i % 4 == 2:
        how = dict(steps=rng.choice((2, 3, block, block + 4)), alg=rng.choice(list(DREAM_RULES)))
    return "dream_blocks", block, dict(block_length=block, cache=rng.choice(("prefix", "dual")), **how)


def of_sdar(rng, i):
    block = rng.choice((4, 8, 16))
    how = dict(
        block_length=block,
        strategy=(*SDAR_RULES, "threshold")[i % 4],
        denoising_steps=rng.choice((block, block // 2, 3, 1, block + 2)),
        threshold=rng.choice((0.5, 0.7, 0.95)),
    )
    return "sdar", block, how


def of_nemotron(rng, i):
    block = rng.choice((4, 8, 32))
    how = dict(steps=rng.choice((block, block // 2, 3, 1))) if i % 3 == 2 else dict(threshold=rng.choice((0.5, 0.9)))
    return "nemotron", block, dict(block_length=block, **how)


def of_fast_dllm(rng, i):
    block = 16 if i % 4 == 3 else 32
    return "fast_dllm", block, dict(block_length=block, threshold=rng.choice((0.5, 0.7, 0.9, 1.0)))


SETTINGS = {
    "DreamModel": of_dream,
    "SDARForCausalLM": of_sdar,
    "NemotronLabsDiffusionModel": of_nemotron,
    "Fast_dLLM_QwenForCausalLM": of_fast_dllm,
}


async def answers(engine, requests, stagger=False):
    async def one(i, loop, asked):
        for _ in range(i * 3 if stagger else 0):
            await asyncio.sleep(0)  # arrive a few loop turns later, at another step of the others
        return await engine.generate(asked["prompt"], options(loop, **asked))

    return await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))


async def under_way(engine, requests):
    """The answers to come, after a few steps."""
    load, steps = asyncio.ensure_future(answers(engine, requests)), engine.profile.steps + 4
    await until(lambda: engine.profile.steps >= steps)
    return load


def expect(model, requests, completions, steps=True):
    """Every answer is that of its loop, up to the tokens that were asked for; and so are its steps."""
    for (loop, asked), completion in zip(requests, completions, strict=True):
        tokens, passes = expected(model, loop, **asked)
        assert list(completion.token_ids) == tokens, (loop, asked)
        assert not steps or completion.usage.steps == passes, (loop, asked)
