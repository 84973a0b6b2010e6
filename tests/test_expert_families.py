"""SDAR-MoE and LLaDA2, 2.1's edits included: their authors' loops over transformers' layers, token for token.

Each pass of a loop computes everything again under an explicit block-causal mask; nothing is kept between passes.
"""

import asyncio
import os
import random
import signal

import block_loops
import checkpoints
import pytest
import torch
from block_loops import block_causal, even, ranked
from family_checkpoints import backbone_of, published
from http_requests import CHAT, EIGHT, client_of, post
from worker_faults import wait_for_plan
from worker_waits import until

from dilaserve import BadRequest, Config, Engine, Options, Plan

MOE, LLADA2 = "SDARMoeForCausalLM", "LLaDA2MoeModelLM"


class Backbone:
    """transformers' layers with random weights; `logits` says what each token sees."""

    def __init__(self, architecture):
        self.model, self.mask_id = backbone_of(architecture), checkpoints.MASK

    @torch.no_grad()
    def logits(self, ids, visible):
        hidden = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~visible, torch.finfo(torch.float32).min)
        return self.model(input_ids=torch.tensor([ids]), attention_mask=hidden).logits[0]


def llada2(model, prompt, gen_length, block_length, threshold, steps=None, editing=None, most_checks=16):
    """LLaDA2.0's generate() without `editing`, LLaDA2.1's with it (MODELS of both: no token ends the answer here).

    Returns (tokens, passes).
    """
    begin, b, passes = len(prompt), block_length, 0
    end = -(-(begin + gen_length) // b) * b
    x = list(prompt) + [model.mask_id] * (end - begin)
    for start in range(begin // b * b, begin + gen_length, b):
        stop, answer = start + b, range(max(start, begin), start + b)
        quota = even(b, steps or b)
        step = checks = 0
        while True:
            masks = [p for p in answer if x[p] == model.mask_id]
            if not masks and editing is None:
                break
            if not masks:
                checks += 1
                if checks > most_checks:
                    break
            logits = model.logits(x[:stop], block_causal(stop, b))
            passes += 1
            found = ranked({p: logits[p] for p in masks})
            above = [one for one in found if one[0] > threshold]
            least = 1 if editing is not None else quota[min(step, len(quota) - 1)]
            chosen = above if len(above) >= least else found[:least]
            edits = []
            if editing is not None:
                others = ranked({p: logits[p] for p in answer if p not in masks})
                edits = [one for one in others if one[0] > editing and one[2] != x[one[1]]]
            block_loops.put(x, chosen + edits)
            step += 1
            if editing is not None and not masks and not edits:
                break
    return x[begin : begin + gen_length], passes


def some_requests(architecture, count, seed):
    rng, found = random.Random(seed), []
    for i in range(count):
        block = rng.choice((4, 8, 16, 32))
        prompt = [rng.randrange(256) for _ in range(rng.choice((1, block, block + 1, rng.randint(1, 120))))]
        asked = dict(
            prompt=prompt,
            gen_length=rng.randint(1, 60),
            block_length=block,
            threshold=rng.choice((0.3, 0.6, 0.9)),
        )
        if i % 3 == 1:
            asked["steps"] = rng.choice((block, block // 2, 3))
        if architecture == LLADA2 and i % 3 == 2:
            asked["editing"] = rng.choice((0.0, 0.2, 0.5))
        found.append(asked)
    return found


def options(asked):
    return Options(
        max_tokens=asked["gen_length"],
        block_length=asked["block_length"],
        confidence_threshold=asked["threshold"],
        num_denoising_steps=asked.get("steps"),
        editing_threshold=asked.get("editing"),
        ignore_eos=True,
    )


async def answers(engine, requests):
    return await asyncio.gather(*(engine.generate(asked["prompt"], options(asked)) for asked in requests))


def expect(model, requests, completions):
    for asked, completion in zip(requests, completions, strict=True):
        tokens, _ = llada2(model, **asked)
        assert list(completion.token_ids) == tokens, asked


@pytest.fixture(scope="module", params=[MOE, LLADA2])
def family(request, tmp_path_factory):
    directory = published(tmp_path_factory.mktemp("family") / request.param, request.param)
    return request.param, directory, Backbone(request.param)


async def test_mixed_requests_get_the_reference_answers_alone_and_together(family):
    architecture, directory, model = family
    requests = some_requests(architecture, 16, seed=1)
    async with Engine(Config.of(model=str(directory), devices="cpu")) as engine:
        alone = [await engine.generate(asked["prompt"], options(asked)) for asked in requests[:6]]
        together = await answers(engine, requests)
    expect(model, requests[:6], alone)
    expect(model, requests, together)
    for asked, completion in zip(requests[:6], alone, strict=True):
        if (len(asked["prompt"]) + asked["gen_length"]) % asked["block_length"] == 0:
            assert completion.usage.steps == llada2(model, **asked)[1]


async def test_each_answers_over_http(family):
    async with client_of(family[1]) as client:
        status, answer, _ = await post(client, CHAT, EIGHT)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)


async def test_two_devices_a_change_of_plan_and_a_killed_worker_change_nothing(family):
    architecture, directory, model = family
    requests = some_requests(architecture, 8, seed=2)
    async with Engine(Config.of(model=str(directory), devices="cpu,cpu", plan="1x2", kv_cache_tokens=384)) as engine:
        expect(model, requests, await answers(engine, requests))
        sharded, steps = asyncio.ensure_future(answers(engine, requests)), engine.profile.steps + 4
        await until(lambda: engine.profile.steps >= steps)
        os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL)
        expect(model, requests, await sharded)
        await wait_for_plan(engine)
        await engine.replan(Plan(((0,), (1,))))
        expect(model, requests, await answers(engine, requests))


async def test_edits_replace_tokens_that_were_unmasked(tmp_path):
    """Without this the tests above might not see any."""
    model = Backbone(LLADA2)
    asked = dict(prompt=[5, 9, 200, 31], gen_length=28, block_length=32, threshold=0.3)
    found = {editing: llada2(model, **asked, editing=editing)[0] for editing in (None, 0.0)}
    assert found[None] != found[0.0]


async def test_a_family_without_edits_refuses_the_threshold_for_them(random_model):
    async with Engine(Config.of(model=str(random_model), devices="cpu")) as engine:
        with pytest.raises(BadRequest, match="does not replace tokens that are unmasked"):
            await engine.generate([1, 2, 3], Options(max_tokens=4, editing_threshold=0.5))
