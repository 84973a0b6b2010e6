"""A timer that rings a doorbell at a time which may be set again. It does not know what the time is for."""

import asyncio
import math

from dilaserve.engine.doorbell import Bell


class Alarm:
    """Rings the bell once at the time that was set last."""

    def __init__(self, bell: Bell) -> None:
        self.loop, self.bell = asyncio.get_running_loop(), bell
        self.timer: asyncio.TimerHandle | None = None
        self.at = math.inf
        self.rang_at = -math.inf  # the time it was last set to when it rang; the loop's clock may be slightly behind

    def set(self, when: float) -> None:
        """Ring at `when`, on the loop's clock, and not at the time set before; infinity: never."""
        self.at = when
        if self.timer:
            self.timer.cancel()
        self.timer = None if when == math.inf else self.loop.call_at(when, self.ring, when)

    def ring(self, when: float) -> None:
        self.rang_at, self.at, self.timer = when, math.inf, None
        self.bell.ring()
