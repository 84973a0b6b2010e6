"""Which deadlines can be met, in which order rows are served, and the thresholds that meet their deadlines."""

import math
from collections.abc import Sequence

from dilaserve.config import SchedulerConfig
from dilaserve.profile.forecast import ThresholdStep
from dilaserve.scheduler.accuracy_ledger import AccuracyLedger
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.accuracy_budget import affordable_level, budget_of
from dilaserve.scheduler.rules.admission import HOPELESS, hopeless
from dilaserve.scheduler.rules.demand import alone
from dilaserve.scheduler.rules.ordering import ORDERS, Place
from dilaserve.scheduler.rules.thresholds import CONTROLS, ThresholdChoice, ThresholdQuery, fixed_levels, moved
from dilaserve.types import Request

LOWEST_FLOOR = 1  # deepest threshold level that load alone may force; 1 is the first below a request's own
CROWD_NEW = 0.3  # weight of the newest crowding in its running mean; a larger value moves the floor sooner


class Deadlines:
    """Applies the policies of deadlines and thresholds to rows, by the estimates of steps and step costs.

    `degrees` are those of the instances that there are.
    """

    def __init__(self, policy: SchedulerConfig, estimates: Estimates) -> None:
        self.estimates = estimates
        self.order = ORDERS[policy.scheduling]
        self.control = CONTROLS[policy.threshold_control]
        self.moves_floor = policy.threshold_control == "slack+floor"
        self.controls = policy.threshold_control != "fixed"
        self.composes = policy.scheduling == "composed"
        self.sheds = policy.shed == "on"
        self.ledger = AccuracyLedger(None if policy.accuracy_budget == "off" else policy.accuracy_budget)
        self.least = policy.min_confidence_threshold
        self.degrees: tuple[int, ...] = (estimates.base,)
        self.floor = 0
        self.crowd = 0.0

    @property
    def admits(self) -> bool:
        """Whether arrivals are tested. Estimated step costs are not good enough to decline a request."""
        return self.composes and self.estimates.sure(self.degrees)

    @property
    def shed(self) -> bool:
        return self.sheds and self.estimates.sure(self.degrees)

    def arrived(self, request: Request) -> RequestState:
        """The request with the thresholds that it may run at: its own, and lower ones that all sides allow."""
        own = ThresholdStep(request.decoding.confidence_threshold, math.inf)
        steps = [own]
        if self.controls and not request.slo.fixed and request.decoding.rule == "threshold":
            least = max(self.least, request.slo.floor)
            ladder = self.estimates.forecast.ladder(request.slo.task)
            steps += [step for step in ladder if least - 1e-6 <= step.threshold < own.threshold - 1e-6]
        thresholds, yields = zip(*steps, strict=True)
        forecast, levels = self.estimates.forecast, self.estimates.levels(request, thresholds)
        drops = tuple([forecast.drop(request.slo.task, level) for level in levels])
        means = tuple([forecast.mean_drop(request.slo.task, level) for level in levels])
        budget = math.inf if self.ledger.budget is None else budget_of(request.slo, self.ledger.budget)
        early = affordable_level(drops, budget)
        return RequestState(request, self.estimates.kind(request), thresholds, drops, means, yields, early)

    def rank(self, state: RequestState) -> float:
        """The order of service; the smallest first."""
        deadline = math.inf if state.deadline is None else state.deadline
        seconds = self.estimates.unloaded(state) if self.order is ORDERS["least-slack"] else 0.0
        return self.order(Place(state.request.arrived_at, deadline, seconds))

    @property
    def rank_moves(self) -> bool:
        """Whether the order of rows changes as they get on."""
        return self.order is ORDERS["least-slack"]

    def threshold_query(self, state: RequestState, now: float, degree: int) -> ThresholdQuery:
        """What the rule of thresholds asks of a row."""
        return ThresholdQuery(
            state.left(now),
            self.estimates.loads(state, degree),
            self.ledger.deepest(state),
            state.affordable_level,
        )

    def choose_thresholds(self, queries: Sequence[ThresholdQuery], degree: int) -> list[ThresholdChoice]:
        """Level and slack of the rows with deadlines on one instance, given in the order of service."""
        pace = self.estimates.pace(degree)
        control = self.control if pace.sure else fixed_levels
        return control(queries, self.floor, pace.fixed)

    def is_hopeless(self, state: RequestState, now: float) -> bool:
        """Whether it can end in time on no kind of instance that there is."""
        return all(hopeless(state.left(now), self.shortest(state, now, degree)) for degree in self.degrees)

    def hopeless_at(self, state: RequestState) -> float:
        """When a request that waits can no longer end in time, as expected now; its deadline while that is a guess."""
        assert state.deadline is not None, "only requests with deadlines become hopeless"
        if not self.shed:
            return state.deadline
        return state.deadline - HOPELESS * min(self.shortest(state, 0.0, degree) for degree in self.degrees)

    def shortest(self, state: RequestState, now: float, degree: int) -> float:
        """Seconds that the request still takes alone at the lowest threshold that it may use."""
        query = self.threshold_query(state, now, degree)
        return alone(query.loads[query.deepest], self.estimates.pace(degree).fixed)

    def is_never_feasible(self, state: RequestState) -> bool:
        """Whether a row without steps had too little time when it came here; not known before what steps cost is."""
        return self.estimates.sure(self.degrees) and self.is_hopeless(state, state.request.received_at)

    def is_past(self, state: RequestState, now: float) -> bool:
        return state.left(now) <= 0.0

    def look(self, missing: float, total: int, crowd: float) -> None:
        """Move the floor of the thresholds by the share of rows expected to miss, and by how many there are."""
        self.crowd += CROWD_NEW * (crowd - self.crowd)
        self.floor = moved(self.floor, missing / total if total else 0.0, self.crowd, LOWEST_FLOOR)
