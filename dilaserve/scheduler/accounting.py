"""What is counted when a request ends: its fate, its device time, and the accuracy that its tenant has spent."""

from dilaserve.scheduler.accuracy_ledger import AccuracyLedger
from dilaserve.scheduler.planner_requests import PlannerRequests
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.totals import Fate, Totals


class Accounting:
    """Counts each request once."""

    def __init__(self, ledger: AccuracyLedger, planning: PlannerRequests, totals: Totals) -> None:
        self.ledger, self.planning, self.totals = ledger, planning, totals

    def charge(self, state: RequestState, fate: Fate) -> None:
        """The tenant's accuracy budget pays for an answer, and for a part of one that its client keeps."""
        self.ledger.reserve(state, 0.0)
        if fate == "answered":
            self.ledger.charge(state)
        elif fate in ("cancelled", "failed") and (given := state.prefix - state.request.prompt_tokens) > 0:
            self.ledger.charge(state, min(1.0, given / state.request.max_tokens))

    def ended(self, state: RequestState, now: float, fate: Fate) -> None:
        """Count the request's fate, and the device seconds spent on it."""
        met = None if state.deadline is None else fate == "answered" and now <= state.deadline
        state.wasted = met is False and fate != "cancelled"
        if met is not None and fate != "cancelled":
            self.planning.ended(state, met, now)
        self.totals.ended(fate, met)
        self.totals.spent(state.device, state.wasted)
