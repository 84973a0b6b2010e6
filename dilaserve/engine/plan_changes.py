"""Changes of the plan as the engine sees them: asked for by hand or by the planner, awaited, remembered and logged."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping

from dilaserve.engine.profile import Profile
from dilaserve.planner.planner import PlannerPort
from dilaserve.plans import spelled
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.step_cost import StepCost, alike
from dilaserve.system import backoff
from dilaserve.types import Change, Demand, PlanReady

log = logging.getLogger(__name__)
MAX_HISTORY = 256  # changes of plan that are remembered
PLANNER_PAUSE = 2.0  # seconds before a planner that has failed is asked again; doubles with each failure in a row
MOST_PLANNER_PAUSE = 60.0  # seconds; it doubles no further
Known = Callable[[], tuple[dict[int, StepCost], QualityProfile]]


class PlanChanges:
    """Those who wait for a plan, and the changes so far. `moved`: instances have come or gone since the last one."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.history: deque[Change] = deque(maxlen=MAX_HISTORY)
        self.moved = False
        self.waiting: list[asyncio.Future[Change]] = []

    def next(self) -> asyncio.Future[Change]:
        """The next plan that stands."""
        change: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        self.waiting.append(change)
        return change

    def stands(self, change: Change) -> None:
        """A plan stands: tell those who wait for it; one that is new, or stands anew, is remembered and logged too."""
        if self.moved or change.before != change.after:
            self.remember(change)
        self.moved = False
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(change)
        self.waiting.clear()

    def remember(self, change: Change) -> None:
        if self.history:
            pause = "" if change.pause is None else f", rows paused {1000 * change.pause:.1f} ms"
            plans = f"{spelled(change.before)} to {spelled(change.after)}"
            log.info("plan %s: %s (%.1f ms%s)", plans, change.reason, 1000 * change.seconds, pause)
            self.profile.changes += 1
            self.profile.paused += change.pause or 0.0
        self.history.append(change)

    def fail(self, error: BaseException) -> None:
        """No plan will stand any more."""
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # nobody need be there to hear it


class PlannerQuestions:
    """Asks the planner in a thread; one that fails is asked again, after a pause that doubles each time."""

    def __init__(self, planner: PlannerPort, laws: Mapping[int, StepCost], known: Known) -> None:
        self.planner, self.known = planner, known
        self.laws = dict(laws)  # that the planner knows
        self.failures = 0  # in a row

    async def answer(self, demand: Demand) -> PlanReady:
        try:
            answer = await self.ask(demand)
            self.failures = 0
        except Exception:
            self.failures += 1
            pause = backoff.pause(self.failures, PLANNER_PAUSE, MOST_PLANNER_PAUSE)
            log.exception("the planner has failed; the plan stays as it is, and it is asked again in %g s", pause)
            await asyncio.sleep(pause)
            answer = PlanReady(None, "the planner has failed")
        return answer

    async def ask(self, demand: Demand) -> PlanReady:
        """The planner's answer, with what has been learned of step costs and quality since it last heard of them."""
        laws, quality = self.known()
        if not alike(laws, self.laws):
            await asyncio.to_thread(self.planner.learned, laws, quality)
            self.laws = laws
        return await asyncio.to_thread(self.planner, demand)
