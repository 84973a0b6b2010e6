"""`GET /v1/stats`: the last minutes of a server, and the steps of its requests."""

import asyncio

import pytest
from http_requests import CHAT, HELLO, post
from virtual_time import run_on_virtual_time

from dilaserve import Config, Engine, Options
from dilaserve.engine.request_views import thresholds_in_force, under_way, views
from dilaserve.scheduler.step_reports import KEPT_STEPS
from dilaserve.server.history import KEPT, History, percentile
from dilaserve.server.metrics import EngineCollector
from dilaserve.server.stats import columns
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended

on_loop = pytest.mark.asyncio(loop_scope="module")


async def stats(client, query=""):
    async with client.get(f"/v1/stats{query}") as response:
        return response.status, await response.json()


@on_loop
async def test_the_steps_of_a_request_that_has_ended_are_its_timeline(client):
    _, answer, _ = await post(client, CHAT, HELLO)
    status, found = await stats(client)
    assert status == 200
    one = found["timelines"][0]
    cost = answer["dilaserve"]
    assert (one["steps"], one["refreshes"], one["tokens"]) == (cost["steps"], cost["refreshes"], 24)
    assert (one["ended"], one["ranks"], one["threshold"]) == (True, [], 0.9)
    kinds = [kind for kind, _, _ in one["timeline"]]
    assert (len(kinds), kinds.count("refresh"), kinds[0]) == (cost["steps"], cost["refreshes"], "refresh")
    starts = [start for _, start, _ in one["timeline"]]
    assert starts == sorted(starts)
    assert one["arrived_at"] <= starts[0] <= found["now"]
    assert found["plan"]["groups"] == [[0]]
    assert found["requests"]["running"] == 0
    assert found["budget"]["limit"] == 0.9


@on_loop
async def test_a_time_that_is_none_is_refused(client):
    status, body = await stats(client, "?since=yesterday")
    assert (status, body["error"]["param"]) == (400, "since")


@on_loop
async def test_each_second_counts_what_came_and_ended_in_it(client, engine):
    history = History(engine)
    engine.observers.append(history)
    history.take(engine.loop.time(), at=1000.0)
    for deadline in (60_000, 60_000, 0.001, None):
        await post(client, CHAT, HELLO | {"slo": {"deadline_ms": deadline}})
    history.take(engine.loop.time(), at=1001.0)
    history.take(engine.loop.time() + 60, at=1002.0)
    engine.observers.remove(history)
    idle, busy, later = history.seconds
    assert (idle.arrivals, idle.answered, idle.p50, idle.threshold) == (0, 0, None, None)
    assert (busy.arrivals, busy.answered, busy.met, busy.late, busy.declined, busy.tokens) == (4, 4, 2, 1, 0, 96)
    assert 0 < busy.p50 <= busy.p90 <= busy.p99
    assert busy.lowest_threshold <= busy.threshold <= 0.9
    assert (later.arrivals, later.p50, later.threshold) == (0, None, None)
    assert columns(history.seconds)["arrivals"] == [0, 4, 0]
    assert columns([])["at"] == []


def test_a_running_request_shows_its_last_steps_and_the_history_its_last_minutes():
    """On virtual time: ten minutes and more take no time here."""

    async def watched():
        config = Config.of(max_model_len=1024, plan="1x2")
        async with Engine(config, assemble=pretended(llada_8b_h200(), 2, 1024)) as engine:
            history = History(engine)
            history.start()
            options = Options(max_tokens=512, num_denoising_steps=512, ignore_eos=True)
            async with await engine.submit([5] * 64, options) as stream:
                found = await seen_after(engine, 2 * KEPT_STEPS)
                async for _ in stream:
                    pass
            await asyncio.sleep(KEPT + 100)
            history.close()
            return found, views(engine.scheduler, 8), history.seconds

    running, after, seconds = run_on_virtual_time(watched())
    assert (running.ended, running.ranks, running.threshold) == (False, (0, 1), None)
    assert len(running.timeline) == KEPT_STEPS
    assert {step.kind for step in running.timeline} == {"refresh", "reuse"}
    (ended,) = after
    assert (ended.ended, ended.ranks, ended.tokens) == (True, (), 512)
    assert ended.steps > running.steps
    assert len(seconds) == KEPT
    assert [second.arrivals for second in seconds] == [0] * KEPT
    assert seconds[-1].at > 0


def test_only_requests_that_go_by_a_threshold_have_one_in_force():
    async def watched():
        profile = llada_8b_h200()
        config = Config.of(max_model_len=1024, plan="1x1", max_num_seqs=2, confidence_threshold=0.4)
        async with Engine(config, assemble=pretended(profile, 1, 1024)) as engine:
            by_steps = Options(max_tokens=512, num_denoising_steps=512, ignore_eos=True)
            by_threshold = Options(max_tokens=512, confidence_threshold=0.8, ignore_eos=True)
            for options in (by_steps, by_threshold, by_threshold):
                await engine.submit([5] * 64, options)
            await asyncio.sleep(0.05)
            families = {family.name: family.samples for family in EngineCollector(engine).collect()}
            return thresholds_in_force(engine.scheduler), under_way(engine.scheduler), families

    in_force, now, found = run_on_virtual_time(watched())
    assert (in_force, now) == ([0.8], (2, 1))
    assert {one.labels["of"]: one.value for one in found["dilaserve_confidence_threshold"]} == {
        "lowest": 0.8,
        "mean": 0.8,
    }
    (running,), (waiting,) = found["dilaserve_requests_running"], found["dilaserve_requests_waiting"]
    assert (running.value, waiting.value) == (2, 1)


async def seen_after(engine, steps):
    """The running request once it has taken so many steps."""
    while True:
        await asyncio.sleep(0.01)
        found = views(engine.scheduler, 8)
        if found and found[0].steps >= steps:
            return found[0]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([1.0, 2.0], 0.5, 1.0), ([float(n) for n in range(1, 101)], 0.9, 90.0)],
)
def test_a_percentile_is_a_value_that_occurred(values, share, expected):
    assert percentile(values, share) == expected
