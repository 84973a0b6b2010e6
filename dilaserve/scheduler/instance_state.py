"""The state of one instance: the rows and pages on it, its step in flight, and what that step should cost."""

import math

from dilaserve.profile.step_cost import Features
from dilaserve.scheduler.kv_pages import PagePool
from dilaserve.scheduler.request_state import RequestState
from dilaserve.types import Batch, Copy, Instance, Span


class InstanceState:
    """One instance, the rows on it, and the batch in flight."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.degree = len(instance.ranks)
        self.pages = PagePool(instance.kv_tokens)
        self.copies: list[Copy] = []  # of K/V, to be made before its next step
        self.residents: dict[int, RequestState] = {}
        self.with_deadline: list[RequestState] = []  # those with a deadline, in order of service
        self.in_flight: list[RequestState] | None = None
        self.batch: Batch | None = None
        self.spans: list[Span] = []  # of its last step that is known, by row in flight
        self.multi_step = False  # it has taken more steps than its first
        self.stops_early = False  # the batch ends with the step that is under way
        self.launched_at = 0.0
        self.disturbed = False  # the engine did not run for a part of the step in flight
        self.overdue_at = math.inf  # when the step in flight counts as hung
        self.killed = False  # a step on it counted as hung
        self.doomed = False  # a worker of it is gone; it is lost as soon as the others have left it
        self.features = Features(0, 0, 0, 0, 0)
        self.refreshing = False
        self.saved = 0.0  # seconds that best-effort rows may still add to steps with deadlines
        self.credits: dict[str, float] = {}  # seconds of step time that tenants have saved up, while others wait too
        self.shares: list[float] = []  # of the step's time, by row in flight
        self.added: dict[int, float] = {}  # seconds that each row adds to the step in flight
        self.ends_at = -math.inf  # when the step in flight is expected to end
        self.late = 0  # rows with deadlines that its last step expected to miss them
        self.crowding = 0.0  # of the rows with deadlines at its last step
