"""When the planner is asked for a plan, and what it learns of the traffic. It does not judge plans."""

from dilaserve.scheduler.arrivals import Traffic
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.plan_change import PlanState, plan_of
from dilaserve.types import Demand, Solve

SOLVE_EVERY = 2.0  # seconds between two questions to the planner
SOLVE_SOON = 1.0  # the same, in the first seconds of the first traffic: the first plan was made without any


class PlannerQuestions:
    """`solves`: the planner is asked at all, which a plan chosen by hand ends."""

    def __init__(self, placement: Placement, plan_state: PlanState, solves: bool) -> None:
        self.placement, self.plan_state, self.solves = placement, plan_state, solves
        self.traffic = Traffic()
        self.solving = False  # a question has no answer yet
        self.solve_at = 0.0  # the earliest time of the next question

    @property
    def asks(self) -> bool:
        """Whether another question will come: not while one is open, nor during a change of plan."""
        return self.solves and not self.solving and self.plan_state.change is None

    def solve(self, now: float) -> Solve:
        """The question to the planner, with the traffic since the last plan."""
        self.solving, self.solve_at = True, now + (SOLVE_SOON if self.traffic.begins(now) else SOLVE_EVERY)
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
        return Solve(demand)

    def first_traffic(self, now: float) -> None:
        """The first request ever has come: ask sooner."""
        if self.traffic.since is None:
            self.solve_at = min(self.solve_at, now + SOLVE_SOON)
