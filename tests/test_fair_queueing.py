"""Tenants and clients beside each other on one instance: nobody's requests wait for all of another's."""

import asyncio
import math

import pytest
from simulated_runs import latency

from dilaserve.config import Config
from dilaserve.engine.engine import Engine
from dilaserve.errors import Overloaded
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended


@pytest.mark.parametrize("wish", [{}, {"deadline_ms": 60_000}])
@pytest.mark.parametrize("scheduling", ["fcfs", "edf", "least-slack", "composed"])
def test_one_tenant_with_a_thousand_requests_does_not_keep_another_waiting(scheduling, wish):
    async def crowded():
        config = Config.of(plan="1x1", max_queue=1024, scheduling=scheduling)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            alone = await latency(engine)
            greedy = [asyncio.create_task(latency(engine, user="greedy", **wish)) for _ in range(1008)]
            await asyncio.sleep(1.0)
            other = await latency(engine, user="other", **wish)
            assert sum(task.done() for task in greedy) < 500
            await asyncio.gather(*greedy)
            return alone, other

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        alone, other = runner.run(crowded())
    assert other < 20 * alone


def test_a_full_queue_drops_a_request_of_the_largest_tenant_for_a_smaller_one():
    async def crowded():
        config = Config.of(plan="1x1", max_queue=16, max_num_seqs=4)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            greedy = [asyncio.create_task(latency(engine, user="greedy")) for _ in range(16)]
            await asyncio.sleep(0.1)
            with pytest.raises(Overloaded) as caught:
                await latency(engine, user="greedy")
            assert caught.value.retry_after
            others = [asyncio.create_task(latency(engine, user="other")) for _ in range(20)]
            ends = [await asyncio.gather(*tasks, return_exceptions=True) for tasks in (greedy, others)]
            assert engine.scheduler.totals.fates["refused"] == 1 + 20
            return [sum(isinstance(end, float) for end in found) for found in ends]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(crowded()) == [8, 8]


def test_clients_that_retry_after_the_given_time_are_served():
    """Eight on two places, each with the four tries of OpenAI's client at most."""

    async def patient(engine):
        for _ in range(4):
            try:
                return await latency(engine)
            except Overloaded as error:
                await asyncio.sleep(math.ceil(error.retry_after))
        return None

    async def crowded():
        config = Config.of(plan="1x1", max_queue=2)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 4096)) as engine:
            return await asyncio.gather(*(patient(engine) for _ in range(8)))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert None not in runner.run(crowded())


def test_priority_counts_without_a_deadline_among_the_requests_of_a_tenant():
    async def crowded():
        config = Config.of(plan="1x1", max_num_seqs=1)
        async with Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine:
            tasks = [asyncio.create_task(latency(engine, priority=priority)) for priority in (0, -1, 0, 1)]
            return await asyncio.gather(*tasks)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        _, low, middle, high = runner.run(crowded())
    assert high < middle < low
