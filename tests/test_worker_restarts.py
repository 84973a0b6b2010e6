"""When a worker process that has ended is started again."""

import asyncio
import contextlib
import itertools

from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run_on_virtual_time

from dilaserve.executor.worker_handle import Ended, WorkerExit
from dilaserve.executor.worker_processes import ProcessExecutor
from dilaserve.system import backoff


@given(st.integers(-3, 10**4), st.floats(0.01, 10.0), st.floats(10.0, 100.0))
def test_pauses_double_up_to_the_longest(failures, first, most):
    pauses = [backoff.pause(failures + more, first, most) for more in (0, 1)]
    assert pauses[0] == (0.0 if failures <= 0 else min(most, first * 2.0 ** min(failures - 1, 32)))
    assert pauses[0] <= pauses[1] <= most


def test_a_worker_that_crashes_before_its_first_step_is_restarted_after_growing_pauses():
    """One that has finished a step, or that somebody else ended, is started again at once."""
    crash, outside = WorkerExit(Ended.LOST, "hung"), WorkerExit(Ended.LOST, "killed", outside=True)
    exits = [crash, crash, crash, outside, crash, crash, "useful", crash, *[crash] * 6]

    class Dying(ProcessExecutor):
        async def run_once(self, rank, job, life, ready):
            born.append(asyncio.get_running_loop().time())
            if life > len(exits):
                await asyncio.sleep(1e6)
            end = exits[life - 1]
            self.useful = {rank} if end == "useful" else set()
            return crash if end == "useful" else end

    async def lives():
        job = type("Job", (), {"device": "cpu", "shards": 1})
        dying, ready = Dying([job], None, None), asyncio.get_running_loop().create_future()
        ready.set_result(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1000.0):
                await dying.keep_running(0, job, ready)

    born = []
    run_on_virtual_time(lives())
    pauses = [round(later - earlier, 6) for earlier, later in itertools.pairwise(born)]
    assert pauses == [0.5, 1.0, 2.0, 0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
