"""Runs long work off the event loop, in a few threads: many would take the interpreter's lock from it in turns."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
LONG = 4096  # characters, or ids, from which work on them leaves the loop
THREADS = 2  # threads for such work; more would contend for the interpreter's lock


class Offload:
    """Called with the size of some work, in characters or ids, and the work; short work is done at once."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(THREADS, "dilaserve-text")

    async def __call__(self, size: int, work: Callable[[], T]) -> T:
        return work() if size < LONG else await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


async def apart(work: Callable[[], None]) -> None:
    """Run blocking work in a thread, or here if the interpreter is ending and starts no more threads."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:
        work()
    else:
        await done
