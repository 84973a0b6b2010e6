"""Runs a coroutine on an event loop whose clock jumps to the next timer."""

import asyncio

from dilaserve.sim.clock import VirtualLoop


def run_on_virtual_time(work):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
