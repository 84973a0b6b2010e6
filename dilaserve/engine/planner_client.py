"""Asks the planner for a plan, off the event loop, and again after a pause when it fails."""

import asyncio
import logging

from dilaserve.planner.planner import PlannerPort
from dilaserve.profile.step_cost import StepCost, alike
from dilaserve.scheduler.estimates import Estimates
from dilaserve.system import backoff
from dilaserve.types import Demand, PlanReady

log = logging.getLogger(__name__)
FIRST_PAUSE = 2.0  # seconds before a planner that failed is asked again; doubles with each failure in a row
MOST_PAUSE = 60.0  # seconds beyond which that pause does not grow


class PlannerClient:
    """One planner, and the step costs that it was last given."""

    def __init__(self, planner: PlannerPort, laws: dict[int, StepCost], estimates: Estimates) -> None:
        self.planner, self.laws, self.estimates = planner, laws, estimates
        self.failures = 0  # in a row

    async def answer(self, demand: Demand) -> PlanReady:
        """The planner's answer; if it fails, no plan, after a pause that doubles with each failure."""
        try:
            answer = await self.ask(demand)
            self.failures = 0
        except Exception:
            self.failures += 1
            pause = backoff.pause(self.failures, FIRST_PAUSE, MOST_PAUSE)
            log.exception("the planner has failed; the plan stays as it is, and it is asked again in %g s", pause)
            await asyncio.sleep(pause)
            answer = PlanReady(None, "the planner has failed")
        return answer

    async def ask(self, demand: Demand) -> PlanReady:
        """First give the planner the step costs and quality learned since the last time, if they differ by much."""
        laws, quality = self.estimates.known()
        if not alike(laws, self.laws):
            await asyncio.to_thread(self.planner.learned, laws, quality)
            self.laws = laws
        return await asyncio.to_thread(self.planner, demand)
