"""The one timer of an engine: when to decide again, whatever happens or not."""

import asyncio
import math
from collections.abc import Callable


class Alarm:
    """Calls `ring` once at the time that was set last."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self.loop, self.ring = loop, ring
        self.timer: asyncio.TimerHandle | None = None
        self.at = math.inf
        self.rang_at = -math.inf

    def now(self) -> float:
        """The loop's time, at least that of the last alarm: timers ring within the clock's resolution, before it."""
        return max(self.loop.time(), self.rang_at)

    def set(self, when: float) -> None:
        """Ring at `when`; infinite: not at all."""
        if when != self.at:
            self.at = when
            if self.timer:
                self.timer.cancel()
            self.timer = None if when == math.inf else self.loop.call_at(when, self.rang, when)

    def rang(self, when: float) -> None:
        self.rang_at, self.at, self.timer = when, math.inf, None
        self.ring()
