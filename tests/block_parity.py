"""Recorded cases and random requests as arguments of the block loops and of the engine."""

import json
import shutil
from pathlib import Path

import block_loops
import checkpoints

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
    elif loop == "sdar":
        found |= dict(num_denoising_steps=asked["denoising_steps"], decode=SDAR_RULES[asked["strategy"]])
    elif loop == "nemotron" and asked.get("threshold") is None:
        found["num_denoising_steps"] = asked.get("steps") or asked["block_length"]
    ends = [token for token in (asked.get("eos"), asked.get("stop"), *asked.get("stop_ids", ())) if token is not None]
    return Options(**found, ignore_eos=True, stop_token_ids=tuple(ends), include_stop_str_in_output=bool(ends))


def expected(model, loop, **asked):
    """(tokens, passes) of the reference."""
    return getattr(block_loops, loop)(model, **asked)
