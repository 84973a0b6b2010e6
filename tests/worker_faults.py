"""Breaks workers of an engine under load, checks the answers, and waits for the plan to be restored."""

import asyncio

from parity import asked, some_requests
from worker_waits import until


async def answers_under_fault(engine, fault):
    """Call `fault` while many requests run, and check that each gets the answer that it gets alone."""
    requests = [request | {"cache": "none"} for request in some_requests(6, seed=21)]
    alone = [(await engine.generate(*asked(**request))).token_ids for request in requests]
    load = [asyncio.create_task(engine.generate(*asked(**request))) for request in requests * 2]
    steps = engine.profile.steps + 3
    await until(lambda: engine.profile.steps >= steps)
    fault()
    completions = await asyncio.gather(*load)
    assert [completion.token_ids for completion in completions] == alone * 2


async def wait_for_plan(engine):
    """Wait until the wanted plan stands again."""
    await until(lambda: engine.plan == engine.wanted_plan and engine.scheduler.plan_state.change is None)
