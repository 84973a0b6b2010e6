"""Changes of plan: the callers that wait for one, and those completed. It does not decide on any."""

import asyncio
import logging
from collections import deque

from dilaserve.engine.counters import Profile
from dilaserve.plans import spelled
from dilaserve.types import Change

log = logging.getLogger(__name__)
MAX_HISTORY = 256  # completed changes that are remembered; older ones are dropped


class PlanChanges:
    """Completes the futures of callers who wait for a plan, and logs and counts changes."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.history: deque[Change] = deque(maxlen=MAX_HISTORY)
        self.moved = False  # instances were formed or ended since the last completed change
        self.waiters: list[asyncio.Future[Change]] = []

    def next(self) -> asyncio.Future[Change]:
        """A future of the next change that completes."""
        waiter: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter

    def completed(self, change: Change) -> None:
        """All instances of the plan are up. A plan that is new, or was formed again, is remembered and logged."""
        if self.moved or change.before != change.after:
            self.remember(change)
        self.moved = False
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(change)
        self.waiters.clear()

    def remember(self, change: Change) -> None:
        if self.history:
            pause = "" if change.pause is None else f", rows paused {1000 * change.pause:.1f} ms"
            plans = f"{spelled(change.before)} to {spelled(change.after)}"
            log.info("plan %s: %s (%.1f ms%s)", plans, change.reason, 1000 * change.seconds, pause)
            self.profile.changes += 1
            self.profile.paused += change.pause or 0.0
        self.history.append(change)

    def fail(self, error: BaseException) -> None:
        """No change will complete any more."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # mark it as retrieved: the caller may be gone
