"""The planner inside a simulated engine: when it is asked, and which plans follow from quiet and busy times."""

import asyncio

from dilaserve.config import Config
from dilaserve.engine.engine import Engine, Options
from dilaserve.planner.planner import Planner
from dilaserve.plans import parsed
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import ask, pretended
from dilaserve.sim.workload import Job
from dilaserve.types import PlanReady


def test_a_change_of_plan_costs_its_delay_and_loses_no_request():
    async def changing():
        profile = llada_8b_h200()
        async with Engine(Config.of(), assemble=pretended(profile, 4, 1024, delay=0.5)) as engine:
            prompts = [[0] * 100 for _ in range(12)]
            load = [asyncio.create_task(engine.generate(prompt, Options(max_tokens=256))) for prompt in prompts]
            changes = []
            for plan in ("1x4", "2x2", "2x1+1x2"):
                await asyncio.sleep(0.1)
                changes.append(await engine.replan(plan))
            answers = await asyncio.gather(*load)
        return changes, answers

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        changes, answers = runner.run(changing())
    assert [answer.finish_reason for answer in answers] == ["length"] * 12
    for change in changes:
        assert 0.5 - 1e-9 <= change.pause < 0.6  # sums of floats
        assert change.pause <= change.seconds
    assert changes[-1].after.groups[-1] == (3,)


def test_the_engine_asks_the_planner_every_two_seconds_and_applies_its_plan():
    asked = []

    class PlannerPort(Planner):
        def __call__(self, demand):
            asked.append(demand)
            return (
                PlanReady(parsed("1x4", 4, demand.degrees), "a low load") if demand.flows else PlanReady(None, "idle")
            )

    profile = llada_8b_h200()
    planner = PlannerPort({}, profile.quality)

    async def planned():
        async with Engine(Config.of(), assemble=pretended(profile, 4, 1024), planner=planner) as engine:
            await asyncio.sleep(5.0)
            assert len(engine.plan.groups) == 4
            await engine.generate([0] * 100, Options(max_tokens=256))
            await asyncio.sleep(5.0)
            return engine.history[-1]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        change = runner.run(planned())
    assert (change.after.groups, change.reason) == (((0, 1, 2, 3),), "a low load")
    assert len(asked) in (7, 8)


def test_low_load_gets_a_plan_for_latency_and_high_load_one_for_throughput():
    """The engine's own planner: few requests get a TP group of all devices, many get single devices."""

    async def load(rate, seconds):
        async with Engine(Config.of(slo_class="far=3x"), assemble=pretended(llada_8b_h200(), 4, 1024)) as engine:
            async with asyncio.TaskGroup() as group:
                for _ in range(int(rate * seconds)):
                    group.create_task(engine.generate([0] * 100, Options(max_tokens=256, slo_class="far")))
                    await asyncio.sleep(1 / rate)
            return [len(group) for group in engine.plan.groups]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        quiet, busy = runner.run(load(1.0, 12.0)), runner.run(load(18.0, 12.0))
    assert (quiet, busy) == ([4], [1, 1, 1, 1])


def test_a_surge_after_low_load_gets_a_plan_of_single_devices():
    """However great it is: a plan that was taken for latency is left within a few looks."""

    async def rushed():
        async with Engine(Config.of(slo_class="x2=2x"), assemble=pretended(llada_8b_h200(), 4, 1024)) as engine:
            seen = []
            async with asyncio.TaskGroup() as group:
                for rate, seconds in ((1.0, 12.0), (65.0, 7.0)):
                    for _ in range(int(rate * seconds)):
                        group.create_task(ask(engine, Job(0.0, 200, 256, None, 2.0, "cancel_when_late"), ()))
                        await asyncio.sleep(1 / rate)
                    seen.append([len(devices) for devices in engine.plan.groups])
            return seen

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(rushed()) == [[4], [1, 1, 1, 1]]
