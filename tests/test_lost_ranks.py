"""Ranks that are killed or hang: the instance is lost, its requests are not."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import pytest_asyncio
from parity import asked, some_requests
from worker_faults import answers_under_fault, wait_for_plan
from worker_waits import children, is_stopped, until

from dilaserve import Config, Engine, Options, RequestFailed
from dilaserve.plans import spelled

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [5, 6, 7]
PROMPT = [5, 6, 7]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_workers(random_model):
    """Two workers that are killed again and again."""
    before = children(), shared_files()
    async with Engine(Config.of(model=str(random_model), devices="cpu,cpu", plan="1x2", step_timeout=1.0)) as engine:
        yield engine
    assert (children(), shared_files()) == before


def shared_files():
    """Shared memory of this process that has a name."""
    return sorted(Path("/dev/shm").glob(f"*{os.getpid()}*"))


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_killed_rank_ends_its_instance_and_no_request(two_workers, rank):
    survivor = two_workers.executor.workers[1 - rank].process.pid
    await answers_under_fault(
        two_workers, lambda: os.kill(two_workers.executor.workers[rank].process.pid, signal.SIGKILL)
    )
    await wait_for_plan(two_workers)
    assert spelled(two_workers.plan) == "1x2"
    assert two_workers.executor.workers[1 - rank].process.pid == survivor
    reasons = " ".join(change.reason for change in list(two_workers.history)[-2:])
    assert f"worker {rank} is gone (killed by SIGKILL)" in reasons
    assert f"worker {rank} is up" in reasons


async def test_a_rank_that_hangs_is_taken_for_dead(two_workers):
    stopped = two_workers.executor.workers[1].process.pid
    await answers_under_fault(two_workers, lambda: os.kill(stopped, signal.SIGSTOP))
    await wait_for_plan(two_workers)
    assert two_workers.executor.workers[1].process.pid != stopped
    assert any("no answer to a step for" in change.reason for change in two_workers.history)


async def test_the_rows_of_a_lost_instance_wait_for_the_rank_that_lives_on(two_workers, monkeypatch):
    """However long that rank is held between its last collective and its write, its rows are nobody else's yet."""
    await wait_for_plan(two_workers)
    monkeypatch.setattr(two_workers.scheduler.batcher, "patience", 600.0)
    stream = await two_workers.submit(PROMPT, Options(max_tokens=200, block_length=4, ignore_eos=True, cache="none"))
    await anext(stream)
    held, dies = (two_workers.executor.workers[rank].process.pid for rank in (0, 1))
    os.kill(held, signal.SIGSTOP)
    await until(lambda: is_stopped(held))
    try:
        for _ in range(100):
            await asyncio.sleep(0)  # all that it has said is read, and its next step is under way
        await stream.aclose()
        lost = two_workers.profile.workers_lost
        os.kill(dies, signal.SIGKILL)
        await until(lambda: two_workers.profile.workers_lost > lost and len(two_workers.executor.workers) == 2)
        assert stream.request.row not in two_workers.consumer.free
    finally:
        os.kill(held, signal.SIGCONT)
    await until(lambda: stream.request.row in two_workers.consumer.free)
    await wait_for_plan(two_workers)
    assert two_workers.executor.workers[0].process.pid == held


async def test_an_error_in_a_step_fails_the_request_that_brings_it_alone(two_workers):
    prompt, options = asked(**some_requests(1, seed=30)[0])
    alone = await two_workers.generate(prompt, options)
    poison = await two_workers.submit(prompt, Options(max_tokens=100, block_length=4, cache="none"))
    two_workers.table.canvas[poison.request.row, 0] = 10**6  # no row of the embedding
    others = [asyncio.create_task(two_workers.generate(prompt, options)) for _ in range(4)]
    with pytest.raises(RequestFailed):
        async for _ in poison:
            pass
    assert [other.token_ids for other in await asyncio.gather(*others)] == [alone.token_ids] * 4
    await wait_for_plan(two_workers)
    assert any("IndexError" in change.reason for change in two_workers.history)
