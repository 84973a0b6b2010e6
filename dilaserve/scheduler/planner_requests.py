"""When the planner is asked, and what it is told of the demand."""

from collections.abc import Iterator

from dilaserve.scheduler.arrivals import Seen, Traffic
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.plan_change import PlanState, plan_of
from dilaserve.scheduler.request_state import RequestState
from dilaserve.types import Demand, Solve

SOLVE_EVERY = 2.0  # seconds between two questions to the planner
SOLVE_SOON = 1.0  # the same, in the first seconds of the first traffic: the plan was made for none
NEVER = float("inf")


class PlannerRequests:
    """Asks every two seconds while `active`, one question at a time, and not while a plan is being carried out."""

    def __init__(self, active: bool, plan_state: PlanState, placement: Placement, estimates: Estimates) -> None:
        self.active, self.plan_state, self.placement, self.estimates = active, plan_state, placement, estimates
        self.traffic = Traffic()
        self.waiting, self.ask_at = False, 0.0  # for an answer; when to ask next

    @property
    def asks(self) -> bool:
        """Whether the planner will be asked again: not while it thinks, nor while a change is under way."""
        return self.active and not self.waiting and self.plan_state.change is None

    def wake_at(self) -> float:
        return self.ask_at if self.asks else NEVER

    def due(self, now: float) -> Iterator[Solve]:
        """The question that is due now, if one is."""
        if now < self.ask_at or not self.asks:
            return
        self.waiting, self.ask_at = True, now + (SOLVE_SOON if self.traffic.begins(now) else SOLVE_EVERY)
        met, ended = self.traffic.outcome(now)
        demand = Demand(
            seconds=self.traffic.seconds(now),
            flows=self.traffic.flows(now),
            backlog=len(self.placement.queue) + len(self.placement.waiting),
            plan=self.plan_state.wanted or plan_of(self.placement.instances()),
            ranks=tuple(sorted(self.plan_state.workers)),
            degrees=self.plan_state.degrees,
            met=met,
            ended=ended,
        )
        yield Solve(demand)

    def arrived(self, state: RequestState, now: float) -> None:
        """Count a new request; the first traffic of all is asked about soon."""
        if not self.active:
            return
        if self.traffic.since is None:
            self.ask_at = min(self.ask_at, now + SOLVE_SOON)
        request, tightness = state.request, None
        if state.deadline is not None:
            tightness = (state.deadline - request.arrived_at) / max(1e-9, self.estimates.unloaded(state))
        self.traffic.arrived(Seen(now, request.canvas_tokens, request.max_tokens, tightness))

    def ended(self, state: RequestState, met: bool, now: float) -> None:
        """Count the end of a request with a deadline."""
        if self.active:
            self.traffic.ended(state.request.arrived_at, met, now)
