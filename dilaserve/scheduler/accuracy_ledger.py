"""The accuracy that tenants have spent on lower thresholds, what running requests may still spend, and what is left.

The rules of the budget are in `rules/accuracy_budget`; this remembers, by tenant and for all tenants together.
"""

from collections.abc import Iterable
from itertools import islice

from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.accuracy_budget import CREDIT, Bank, budget_left, budget_of, charged, price

MAX_TENANTS = 4096  # tenants whose banks are kept; beyond that an old tenant starts anew
LOOKS = 16  # oldest tenants among which the bank with the most budget left is dropped: a new start gains it least
NEW = Bank()


class AccuracyLedger:
    """`budget`: the mean accuracy drop in points that answers may have, by tenant; None: no limit."""

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self.banks: dict[str, Bank] = {}
        self.reserved: dict[str, float] = {}  # points that running requests may still spend
        self.all, self.pending = NEW, 0.0  # the same of all tenants together: each request may name a new tenant

    @property
    def used(self) -> float | None:
        """The share of the points that all tenants together may have spent by now; None without a limit above 0."""
        if not self.budget:
            return None
        return (self.all.spent + self.pending) / (self.budget * (self.all.served + CREDIT))

    def deepest(self, state: RequestState) -> int:
        """The lowest of the row's thresholds that its tenant can pay for, and all tenants together can."""
        level = len(state.thresholds) - 1
        if self.budget is None or level == 0:
            return level
        tenant, mine, budget = state.request.slo.tenant, state.reserved, budget_of(state.request.slo, self.budget)
        most = budget_left(self.banks.get(tenant, NEW), budget, self.reserved.get(tenant, 0.0) - mine)
        if (every := budget_left(self.all, self.budget, self.pending - mine)) < most:
            most, budget = every, self.budget
        least = price(most, budget)
        drops, spent = state.drops, state.drop
        while level and drops[level] > 0.0:
            if state.yields[level] >= least and drops[level] <= most and spent <= most:
                break
            level -= 1
        return level

    def reserve(self, state: RequestState, drop: float) -> None:
        """Let the bank hold back what a running request may still spend."""
        if drop == state.reserved == 0.0:
            return
        tenant = state.request.slo.tenant
        total = self.reserved.pop(tenant, 0.0) + drop - state.reserved
        if total > 1e-9:
            self.reserved[tenant] = total
        self.pending = self.pending + drop - state.reserved if self.reserved else 0.0
        state.reserved = drop

    def charge(self, state: RequestState, share: float = 1.0) -> None:
        """The request has ended with an answer: its tenant's bank pays for it, and that of all.

        A request whose client left counts by the share of the answer that was delivered. One with a fixed threshold
        does not count.
        """
        request, budget = state.request, self.budget
        if budget is None or request.slo.fixed or request.decoding.rule != "threshold":
            return
        tenant = request.slo.tenant
        self.banks[tenant] = charged(self.banks.pop(tenant, NEW), state.drop, share)
        self.all = charged(self.all, state.drop, share)
        if len(self.banks) > MAX_TENANTS:
            oldest = islice(self.banks, LOOKS)  # tenants without a charge for the longest time
            del self.banks[max(oldest, key=lambda name: budget_left(self.banks[name], budget))]

    def restore(self, requests: Iterable[RequestState]) -> None:
        """Sum the reservations anew, from what each request says of itself."""
        self.reserved = {}
        for state in requests:
            if state.reserved:
                tenant = state.request.slo.tenant
                self.reserved[tenant] = self.reserved.get(tenant, 0.0) + state.reserved
        self.pending = sum(self.reserved.values())
