"""What is decided of a request as it comes: its deadline, whether that can be kept, whether it is too much work."""

from msgspec.structs import replace

from dilaserve.config import SchedulerConfig
from dilaserve.scheduler.arrivals import Seen
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.plan_change import PlanState
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import RequestState

BEST_EFFORT_PLACES = 0.75  # share of --max-queue open to requests without an admitted deadline while deadlines come
NEVER = float("inf")


class ArrivalCheck:
    """Judges requests that come. `tightest`: the shortest recent deadline, in seconds from arrival."""

    def __init__(
        self, policy: SchedulerConfig, placement: Placement, plan_state: PlanState, tightest: RecentMinimum
    ) -> None:
        self.placement, self.plan_state, self.tightest = placement, plan_state, tightest
        self.deadlines, self.estimates = placement.deadlines, placement.estimates
        self.most_best_effort = policy.best_effort_backlog, BEST_EFFORT_PLACES * policy.max_queue

    def deadline(self, state: RequestState) -> float | None:
        """The instant by which the answer is wanted; a multiple is one of the whole answer's time, also where a part
        of it is there.
        """
        request, slo = state.request, state.request.slo
        if slo.seconds is not None:
            return request.arrived_at + slo.seconds
        if slo.multiple is None:
            return None
        whole = self.deadlines.arrived(replace(request, resumed_tokens=0)) if request.resumed_tokens else state
        return request.arrived_at + slo.multiple * self.estimates.unloaded(whole)

    @property
    def tests(self) -> bool:
        """Whether deadlines are tested: not before step costs are known, nor during a change of all instances."""
        changes = not self.placement.replicas and bool(self.placement.closing or self.plan_state.forming)
        return self.deadlines.admits and not changes

    def admissible(self, state: RequestState, now: float) -> bool:
        """Whether an instance takes a newcomer with a deadline, or may do so as soon as a change of plan is done."""
        if not self.tests:
            return True
        check, replicas = self.placement.check, self.placement.open
        return check.passes(state, replicas, now) or check.is_worth_a_try(state, replicas, now)

    def is_too_much(self, state: RequestState, now: float) -> bool:
        """Whether the request would be best effort, while deadlines come and too much such work of others waits."""
        if not self.deadlines.admits or (state.deadline is None and self.tightest.peek(now) == NEVER):
            return False
        devices = sum(replica.degree for replica in self.placement.replicas.values())
        seconds, requests = self.most_best_effort
        others = self.placement.backlog.best_effort - (0.0 if state.has_deadline else state.seconds)
        if others <= seconds * max(1, devices) and self.placement.backlog.requests <= requests:
            return False
        if not state.has_deadline:
            return True
        return state.request.slo.on_miss == "best_effort" and not self.admissible(state, now)

    def seen(self, state: RequestState, now: float) -> Seen:
        """The arrival as planning sees it."""
        request, tightness = state.request, None
        if state.deadline is not None:
            tightness = (state.deadline - request.received_at) / max(1e-9, self.estimates.unloaded(state))
        return Seen(now, request.canvas_tokens, max(1, request.max_tokens - request.resumed_tokens), tightness)
