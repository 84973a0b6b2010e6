"""Dream against its own loop and Fast-dLLM's block sampler, token for token and pass for pass."""

import asyncio
import os
import signal

import aiohttp
import block_checkpoints
import checkpoints
import pytest
import pytest_asyncio
import torch
from block_loops import dream
from block_models import Masked
from block_parity import answers, expect, expected, options, some_requests, under_way
from parity import best_of, same_tops
from worker_faults import wait_for_plan

from dilaserve import BadRequest, Config, Engine, Options
from dilaserve.engine.likelihood import Pseudo, estimate
from dilaserve.server.app import running

pytestmark = pytest.mark.asyncio(loop_scope="module")
ARCHITECTURE = "DreamModel"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint that likes to end."""
    directory = block_checkpoints.make(tmp_path_factory.mktemp("models") / "dream", ARCHITECTURE)
    block_checkpoints.teach_an_end(directory, factor=2.5)
    return directory


@pytest.fixture(scope="module")
def reference(directory):
    return Masked(directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(directory):
    """Of two workers, which are one TP group before and after each test."""
    async with Engine(
        Config.of(model=str(directory), devices="cpu,cpu", plan="1x2", port=0, steps_per_launch=3)
    ) as engine:
        yield engine


async def test_mixed_requests_get_the_reference_answers_alone_and_together(engine, reference):
    requests = some_requests(ARCHITECTURE, 28, seed=1)
    alone = [(await answers(engine, [request]))[0] for request in requests[:8]]
    together = await answers(engine, requests, stagger=True)
    expect(reference, requests[:8], alone)
    expect(reference, requests, together)


@pytest.mark.parametrize("steps", [1, 2, 5, 31, 32, 33, 200])
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
async def test_any_number_of_steps_follows_the_schedule(engine, reference, alg, steps):
    """Steps in which the schedule unmasks nothing are not computed."""
    requests = [("dream", dict(prompt=[7, 8, 9], gen_length=32, steps=steps, alg=alg))]
    completions = await answers(engine, requests)
    expect(reference, requests, completions)
    assert completions[0].usage.steps <= min(steps, 32)


async def test_mask_and_end_tokens_in_the_prompt_are_left_alone(engine, reference):
    prompt = [5, checkpoints.MASK, 70, checkpoints.EOS, checkpoints.MASK]
    requests = [(loop, asked | dict(prompt=prompt)) for loop, asked in some_requests(ARCHITECTURE, 8, seed=2)]
    expect(reference, requests, await answers(engine, requests))


async def test_changes_of_plan_and_a_killed_worker_change_nothing(engine, reference):
    """Under way only without a cache: kept K/V are approximate, and a refresh in a block gives other tokens."""
    requests = some_requests(ARCHITECTURE, 16, seed=6)
    plain = [request for request in requests if request[0] == "dream"]
    sharded = await under_way(engine, plain)
    os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL)
    expect(reference, plain, await sharded, steps=False)
    await wait_for_plan(engine)
    for plan in ("2x1", "1x2"):
        changing = await under_way(engine, plain)
        await engine.replan(plan)
        expect(reference, plain, await changing, steps=False)
        expect(reference, requests, await answers(engine, requests))


async def test_an_answer_over_http_ends_where_the_whole_canvas_has_its_first_end_token(engine, reference):
    requests = [request for request in some_requests(ARCHITECTURE, 16, seed=7) if request[1]["gen_length"] >= 16]
    ended = 0
    async with running(engine, engine.config) as address, aiohttp.ClientSession(address) as client:

        async def posted(loop, asked):
            found = options(loop, **asked)
            names = ("max_tokens", "block_length", "decode", "num_denoising_steps", "confidence_threshold", "cache")
            fields = {name: value for name in names if (value := getattr(found, name)) is not None}
            async with client.post("/v1/completions", json=dict(prompt=asked["prompt"]) | fields) as response:
                return response.status, await response.json()

        found = await asyncio.gather(*(posted(*request) for request in requests))
    for (status, answer), (loop, asked) in zip(found, requests, strict=True):
        assert status == 200, answer
        tokens, _ = expected(reference, loop, **asked)
        end = tokens.index(checkpoints.EOS) if checkpoints.EOS in tokens else len(tokens)
        (choice,) = answer["choices"]
        assert choice["text"] == engine.detokenize(tokens[:end])
        assert choice["finish_reason"] == ("stop" if end < len(tokens) else "length")
        ended += end < len(tokens)
    assert ended >= 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(cache="exact"), "it knows 'none', 'prefix' and 'dual': its K/V change"),
        (dict(decode="entropy"), "decode 'entropy' needs num_denoising_steps"),
        (dict(decode="margin", confidence_threshold=0.5), "confidence_threshold has no meaning under decode 'margin'"),
        (dict(factor=1.0, num_denoising_steps=8), "belong to different decode rules"),
        (dict(max_tokens=64, block_length=8, num_denoising_steps=7), "num_denoising_steps must be at least 8"),
    ],
)
async def test_options_without_a_meaning_are_refused_with_a_reason(engine, fields, words):
    with pytest.raises(BadRequest, match=words):
        await engine.generate([1, 2, 3], Options(**fields))


async def test_known_tokens_have_the_likelihood_of_the_logits_before_them(engine, reference):
    """On two ranks, one of which has the logit of each."""
    text, mask = [40, 7, 99, 181, 3, 3, 60, 250], reference.mask_id
    found = await estimate(engine, text, Pseudo(groups=100), Options(), "exact")
    visible = torch.ones(len(text), len(text)).bool()
    for i in range(1, len(text)):
        logits = reference.logits([mask if place == i else token for place, token in enumerate(text)], visible)[i - 1]
        assert found.logprobs[i] == pytest.approx(float(logits.double().log_softmax(-1)[text[i]]), abs=2e-4)
        assert found.best[i].token_id == best_of(logits, mask)[0][0]


async def test_the_most_probable_tokens_are_those_of_the_logits_before_a_position(engine, directory, reference):
    """On two ranks, each of which has a part of the vocabulary."""
    model, tops = Masked(directory), {}

    def seen(x, visible):
        logits = reference.logits(x, visible)
        masks = [p for p, token in enumerate(x) if token == model.mask_id]
        tops.update({p: best_of(logits[p - 1], model.mask_id) for p in masks})  # until it is unmasked
        return logits

    model.logits, prompt = seen, list(range(40, 60))
    tokens, _ = dream(model, prompt, 16, 16, "maskgit_plus")
    asked = Options(
        max_tokens=16, block_length=16, cache="none", num_denoising_steps=16, ignore_eos=True, top_logprobs=5
    )
    answer = await engine.generate(prompt, asked)
    assert list(answer.token_ids) == tokens
    assert same_tops(answer.top_logprobs, [tops[p] for p in range(len(prompt), len(prompt) + 16)])
