"""What a new request gets: a deadline that is kept, a place in the queue, or an answer that it cannot be served."""

from dilaserve.config import SchedulerConfig
from dilaserve.scheduler.placer import Placer
from dilaserve.scheduler.plan_change import PlanState
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.admission import retry_after
from dilaserve.types import Decline

BEST_EFFORT_PLACES = 0.75  # of --max-queue, which requests without an admitted deadline take while deadlines come
NEVER = float("inf")


class AdmissionControl:
    """Tests requests on arrival. `tightest` is infinite when no deadlines have come lately."""

    def __init__(
        self,
        policy: SchedulerConfig,
        placer: Placer,
        plan_state: PlanState,
        tightest: RecentMinimum,
    ) -> None:
        self.placer, self.placement, self.deadlines = placer, placer.placement, placer.deadlines
        self.plan_state, self.tightest = plan_state, tightest
        self.most_seconds, self.most_requests = policy.best_effort_backlog, BEST_EFFORT_PLACES * policy.max_queue

    def admissible(self, state: RequestState, now: float) -> bool:
        """Whether an instance takes a new request with a deadline, or may do so once a change of plan is done."""
        placement = self.placement
        if not self.deadlines.admits or (not placement.replicas and (placement.closing or self.plan_state.forming)):
            return True
        return self.placer.any_with_slack(state, now) or self.placer.tries(state, now)

    def is_too_much(self, state: RequestState, now: float) -> bool:
        """Whether the request would be best effort, while deadlines come and more of that waits than will be done."""
        if not self.deadlines.admits or self.tightest.at(now) == NEVER:
            return False
        backlog, devices = self.placement.backlog, sum(one.degree for one in self.placement.replicas.values())
        if backlog.best_effort <= self.most_seconds * max(1, devices) and backlog.requests <= self.most_requests:
            return False
        if not state.has_deadline:
            return True
        return state.request.slo.on_miss == "best_effort" and not self.admissible(state, now)

    def declined(self, state: RequestState, now: float) -> Decline:
        """The answer to a request whose deadline cannot be met, or has passed."""
        request, usage = state.request, state.usage(now)
        if state.steps:
            return Decline(request, usage, None)
        wait = retry_after(self.placement.backlog.timed, len(self.placement.replicas))
        return Decline(request, usage, wait, self.deadlines.is_never_feasible(state))
