"""Families with exact K/V against their authors' loops, token for token and step for step; float32, temperature 0."""

import asyncio
import os
import signal
from itertools import groupby

import aiohttp
import block_checkpoints
import checkpoints
import pytest
import pytest_asyncio
from block_models import Masked
from block_parity import answers, ending, expect, expected, options, some_requests, under_way
from worker_faults import wait_for_plan

from dilaserve import BadRequest, Config, Engine, Options
from dilaserve.server.app import running

pytestmark = pytest.mark.asyncio(loop_scope="module")
DEFAULTS = {
    "SDARForCausalLM": ("sdar", dict(block_length=4, strategy="threshold", threshold=0.95, denoising_steps=4)),
    "NemotronLabsDiffusionModel": ("nemotron", dict(block_length=32, threshold=0.9)),
    "Fast_dLLM_QwenForCausalLM": ("fast_dllm", dict(block_length=32, threshold=0.9)),
}


@pytest.fixture(scope="module", params=list(DEFAULTS))
def family(request, tmp_path_factory):
    """An architecture, and a checkpoint of it that likes to end."""
    directory = block_checkpoints.make(tmp_path_factory.mktemp("models") / request.param, request.param)
    block_checkpoints.teach_an_end(directory, factor=2.5)
    return request.param, directory


@pytest.fixture(scope="module")
def reference(family):
    return Masked(family[1])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family):
    """Of two workers, which are one TP group before and after each test."""
    async with Engine(Config.of(model=str(family[1]), devices="cpu,cpu", plan="1x2", port=0)) as engine:
        yield engine


async def test_mixed_requests_get_the_reference_answers_alone_and_together(family, engine, reference):
    requests = some_requests(family[0], 16, seed=1)
    alone = await asyncio.gather(*(answers(engine, [request]) for request in requests[:6]))
    together = await answers(engine, requests, stagger=True)
    expect(reference, requests[:6], [answer for (answer,) in alone])
    expect(reference, requests, together)


async def test_the_canvas_after_each_step_ends_as_the_text_of_its_block(engine):
    options = Options(max_tokens=40, ignore_eos=True, include_canvas=True)
    chunks = [chunk async for chunk in engine.stream("a prompt", options)]
    found = [chunk.canvas for chunk in chunks if chunk.canvas]
    blocks = [list(block) for _, block in groupby(found, key=lambda canvas: canvas.block)]
    shown, text = "".join("".join(block[-1].tokens) for block in blocks), "".join(chunk.text for chunk in chunks)
    assert shown == text.removesuffix(chunks[-1].text)  # whose last part of a character nothing follows
    assert sum(len(block[-1].tokens) for block in blocks) == 40
    assert [canvas.step for canvas in found] == list(range(1, chunks[-1].usage.steps + 1))
    assert sum(canvas.refresh for canvas in found) == chunks[-1].usage.refreshes


async def test_mask_and_end_tokens_in_the_prompt_are_left_alone(family, engine, reference):
    prompt = [5, checkpoints.MASK, 70, checkpoints.EOS, checkpoints.MASK]
    requests = [(loop, asked | dict(prompt=prompt)) for loop, asked in some_requests(family[0], 4, seed=2)]
    requests += [ending(*request, checkpoints.EOS) for request in requests]
    completions = await answers(engine, requests)
    expect(reference, requests[:4], completions[:4])
    expect(reference, requests[4:], completions[4:], steps=False)


async def test_without_options_a_family_decodes_as_its_authors_publish(family, engine, reference):
    loop, how = DEFAULTS[family[0]]
    requests = [(loop, dict(prompt=[9] * length, gen_length=40, **how)) for length in (1, 33)]
    plain = Options(max_tokens=40, ignore_eos=True)
    completions = [await engine.generate(asked["prompt"], plain) for _, asked in requests]
    expect(reference, requests, completions)


async def test_an_answer_ends_with_its_first_stop_token(family, engine, reference):
    requests = [ending(*request, checkpoints.EOS) for request in some_requests(family[0], 24, seed=3)]
    completions = await answers(engine, requests)
    expect(reference, requests, completions, steps=False)
    passes = [expected(reference, loop, **asked)[1] for loop, asked in requests]
    assert all(answer.usage.steps <= most for answer, most in zip(completions, passes, strict=True))
    assert sum(answer.finish_reason == "stop" for answer in completions) >= 6
    for answer in completions:
        assert (answer.finish_reason == "stop") == (answer.token_ids[-1] == checkpoints.EOS)


async def test_a_small_engine_changes_nothing_and_ends_a_long_answer_with_a_shorter_block(family, reference):
    """Of three rows a step, a few tokens beside the first row, launches of several steps, and a canvas that no block
    length divides.
    """
    limit, some = 109, some_requests(family[0], 18, seed=4)
    requests = [request for request in some[:12] if len(request[1]["prompt"]) + request[1]["gen_length"] < limit - 32]
    for loop, asked in some[12:]:
        prompt = (asked["prompt"] * limit)[: limit - asked["gen_length"]]
        requests.append((loop, asked | dict(prompt=prompt, limit=limit)))
    small = dict(
        max_num_seqs=3, max_num_batched_tokens=40, kv_cache_tokens=256, max_model_len=limit, steps_per_launch=3
    )
    async with Engine(Config.of(model=str(family[1]), devices="cpu", **small)) as engine:
        completions = await answers(engine, requests)
        longer = requests[-1][1]["gen_length"] + 1
        with pytest.raises(BadRequest, match=f"lower max_tokens to {longer - 1} or less"):
            await engine.generate(requests[-1][1]["prompt"], Options(max_tokens=longer))
    expect(reference, requests, completions)


async def test_changes_of_plan_and_a_killed_worker_change_nothing(family, engine, reference):
    requests = some_requests(family[0], 8, seed=6)
    sharded = await under_way(engine, requests)
    os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL)
    expect(reference, requests, await sharded, steps=False)
    await wait_for_plan(engine)
    for plan in ("2x1", "1x2"):
        changing = await under_way(engine, requests)
        await engine.replan(plan)
        expect(reference, requests, await changing, steps=False)
        expect(reference, requests, await answers(engine, requests))


async def test_answers_over_http_say_how_they_ended(family, engine, reference):
    """By a stop token of the request, by the model's end token, or by their length."""
    loop, asked = some_requests(family[0], 1, seed=7)[0]
    asked |= dict(gen_length=40)
    whole, _ = expected(reference, loop, **asked)
    end = whole.index(checkpoints.EOS) if checkpoints.EOS in whole else len(whole)
    fields = {
        name: value
        for name in ("max_tokens", "block_length", "decode", "num_denoising_steps", "confidence_threshold")
        if (value := getattr(options(loop, **asked), name)) is not None
    }
    endings = [
        (dict(ignore_eos=True), whole, "length"),
        (dict(ignore_eos=True, stop_token_ids=[whole[7]]), whole[: whole.index(whole[7])], "stop"),
        ({}, whole[:end], "stop" if end < len(whole) else "length"),
    ]
    async with running(engine, engine.config) as address, aiohttp.ClientSession(address) as client:
        for how, tokens, reason in endings:
            async with client.post("/v1/completions", json=dict(prompt=asked["prompt"]) | fields | how) as response:
                answer = await response.json()
            assert response.status == 200, answer
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"]) == (engine.detokenize(tokens), reason)
            assert answer["usage"]["completion_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(cache="dual"), "'exact' alone: its K/V never change"),
        (dict(cache="none"), "'exact' alone: its K/V never change"),
        (dict(refresh_interval=4), "refresh_interval has no meaning for this model: its K/V are exact"),
        (dict(decode="entropy", num_denoising_steps=4), "does not decode by 'entropy'; it knows threshold"),
        (dict(decode="margin", num_denoising_steps=4), "does not decode by 'margin'"),
        (dict(decode="dynamic", confidence_threshold=0.9), "decode 'dynamic' needs num_denoising_steps"),
        (dict(decode="steps", confidence_threshold=0.9), "confidence_threshold has no meaning under decode 'steps'"),
        (dict(num_denoising_steps=0), "num_denoising_steps must lie between 1 and"),
        (dict(block_length=0), "block_length must lie between 1 and"),
    ],
)
async def test_options_without_a_meaning_are_refused_with_a_reason(engine, fields, words):
    with pytest.raises(BadRequest, match=words):
        await engine.generate([1, 2, 3], Options(**fields))
    async with running(engine, engine.config) as address, aiohttp.ClientSession(address) as client:
        async with client.post("/v1/completions", json=dict(prompt=[1, 2, 3]) | fields) as response:
            answer = await response.json()
        assert response.status == 400
        assert words in answer["error"]["message"]
