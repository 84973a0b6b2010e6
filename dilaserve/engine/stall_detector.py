"""Notices when an event loop did not run: its process was stopped, its machine slept, or other work kept it away."""

import asyncio

PERIOD = 1.0  # seconds between two beats while a time limit runs
LATE = 1.0  # seconds by which a beat must be late for the loop to count as absent


class StallDetector:
    """Adds up the seconds in which one loop should have run and did not, while it is watched."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.timer: asyncio.TimerHandle | None = None
        self.watched = False
        self.seen_at = self.absent = 0.0

    def watch(self, watched: bool) -> None:
        """Start or stop watching: stalls matter only while a time limit runs."""
        self.watched = watched
        if watched and self.timer is None:
            self.seen_at = self.loop.time()
            self.timer = self.loop.call_later(PERIOD, self.beat)

    def beat(self) -> None:
        self.look(self.loop.time())
        self.timer = self.loop.call_later(PERIOD, self.beat) if self.watched else None

    def look(self, now: float) -> None:
        gap = now - self.seen_at - PERIOD
        self.absent += gap if gap > LATE and self.timer else 0.0
        self.seen_at = now

    def missed(self, now: float) -> float:
        """Seconds in which the loop did not run, since the last call."""
        self.look(now)
        absent, self.absent = self.absent, 0.0
        return absent

    def stop(self) -> None:
        self.watched = False
        if self.timer:
            self.timer.cancel()
