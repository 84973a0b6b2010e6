"""How work on bodies shares the event loop: one piece at a time, and as much time for everything else."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SLACK = 0.002  # seconds by which work may run ahead of its share


class LoopShare:
    """Runs pieces of work on the event loop, which get half of its time at most.

    Work that takes t seconds is followed by t seconds in which no other piece begins, so that a request that needs a
    few turns of the loop waits for one piece and not for one at every turn. Short pieces do not wait.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.free_at = 0.0

    async def run(self, work: Callable[[], T]) -> T:
        async with self.lock:
            await self.rest()
            began = time.perf_counter()
            try:
                return work()
            finally:
                self.spent(began)

    async def rest(self) -> None:
        if (wait := self.free_at - time.perf_counter() - SLACK) > 0:
            await asyncio.sleep(wait)

    def spent(self, began: float) -> None:
        took = time.perf_counter() - began
        self.free_at = max(self.free_at, began) + 2 * took
