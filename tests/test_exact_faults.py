"""Families with exact K/V under load: little K/V memory, shared prompts, killed workers; float32, temperature 0."""

import asyncio
import os
import random
import signal

import aiohttp
import block_checkpoints
import pytest
from block_models import Masked
from block_parity import answers, expect, some_requests, under_way
from worker_faults import wait_for_plan

from dilaserve import BadRequest, Config, Engine, Options, Plan
from dilaserve.server.app import running

pytestmark = pytest.mark.asyncio(loop_scope="module")
POOL = 256


@pytest.fixture(scope="module", params=["SDARForCausalLM", "NemotronLabsDiffusionModel"])
def family(request, tmp_path_factory):
    directory = block_checkpoints.make(tmp_path_factory.mktemp("models") / request.param, request.param)
    return request.param, directory


@pytest.fixture(scope="module")
def reference(family):
    return Masked(family[1])


def crowd(architecture, count, seed):
    """Requests of which most begin alike, so that answers outgrow the pool and beginnings are reused."""
    rng, found = random.Random(seed), []
    stems = [[rng.randrange(256) for _ in range(length)] for length in (96, 64)]
    for loop, asked in some_requests(architecture, count, seed):
        tail = asked["prompt"][: rng.choice((1, 5, 33))]
        stem = rng.choice((*stems, [], stems[0][:70]))
        found.append((loop, asked | dict(prompt=stem + tail, gen_length=rng.choice((7, 24, 60)))))
    return found


def config(family, pool=POOL, **settings):
    return Config.of(model=str(family[1]), kv_cache_tokens=pool, max_num_batched_tokens=40, **settings)


async def test_little_memory_and_shared_prompts_change_nothing(family, reference):
    requests = crowd(family[0], 12, seed=1)
    async with Engine(config(family, pool=2 * POOL, devices="cpu", max_num_seqs=6)) as engine:
        completions = await answers(engine, requests)
    expect(reference, requests, completions)
    assert any(one.usage.cached_prompt_tokens for one in completions)
    for (_, asked), one in zip(requests, completions, strict=True):
        assert one.usage.cached_prompt_tokens % 32 == 0
        assert one.usage.cached_prompt_tokens <= len(asked["prompt"])


async def test_killed_workers_and_a_change_of_plan_change_nothing(family, reference):
    requests = crowd(family[0], 8, seed=2)
    async with Engine(config(family, devices="cpu,cpu", plan="2x1")) as engine:
        load = await under_way(engine, requests)
        os.kill(engine.executor.workers[0].process.pid, signal.SIGKILL)
        expect(reference, requests, await load, steps=False)
        await wait_for_plan(engine)
        load = await under_way(engine, requests)
        await engine.replan(Plan(((0, 1),)))
        await asyncio.sleep(0.05)
        os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL)
        expect(reference, requests, await load, steps=False)


async def test_a_repeated_prompt_is_computed_once_and_the_answer_is_the_same(family, reference):
    prompt = list(range(1, 131))
    (request,) = [(loop, asked | dict(prompt=prompt, gen_length=40)) for loop, asked in some_requests(family[0], 1, 3)]
    async with Engine(config(family, pool=2 * POOL, devices="cpu")) as engine:
        first, second, shorter = [
            (await answers(engine, [(request[0], request[1] | dict(prompt=prompt[:length]))]))[0]
            for length in (130, 130, 100)
        ]
    expect(reference, [request, request], [first, second])
    assert [one.usage.cached_prompt_tokens for one in (first, second, shorter)] == [0, 128, 96]


async def test_the_next_turn_reuses_keys_and_values_of_the_answer_before_it(family, reference):
    prompt = list(range(1, 71))
    (request,) = [(loop, asked | dict(prompt=prompt, gen_length=128)) for loop, asked in some_requests(family[0], 1, 4)]
    async with Engine(config(family, pool=2 * POOL, devices="cpu")) as engine:
        (first,) = await answers(engine, [request])
        turn = (request[0], request[1] | dict(prompt=[*prompt, *first.token_ids, 7, 8, 9], gen_length=40))
        (second,) = await answers(engine, [turn])
    expect(reference, [request, turn], [first, second])
    assert len(first.token_ids) == 128
    assert second.usage.cached_prompt_tokens >= 160  # all but the last block, which no later step has committed


async def test_a_canvas_longer_than_the_pool_is_refused(family):
    async with Engine(Config.of(model=str(family[1]), devices="cpu", kv_cache_tokens=128, port=0)) as engine:
        with pytest.raises(BadRequest, match="exceeds the K/V pool of 128; lower max_tokens or raise"):
            await engine.generate([1] * 64, Options(max_tokens=100))
        body = dict(prompt=[1] * 64, max_tokens=100)
        async with (
            running(engine, engine.config) as address,
            aiohttp.ClientSession(address) as client,
            client.post("/v1/completions", json=body) as response,
        ):
            answer = await response.json()
        assert response.status == 400
        assert "exceeds the K/V pool of 128" in answer["error"]["message"]
        assert len((await engine.generate([1] * 64, Options(max_tokens=60, ignore_eos=True))).token_ids) == 60
