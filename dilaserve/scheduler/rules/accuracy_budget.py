"""The accuracy budget: how far a tenant's thresholds may be lowered, and which requests may lower theirs first."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from dilaserve.types import Slo

CREDIT = 50  # requests whose accuracy budget a new tenant may spend in advance


class Bank(NamedTuple):
    """Percentage points spent so far, and requests served; half an answer counts as half a request."""

    spent: float = 0.0
    served: float = 0.0


def budget_of(slo: Slo, budget: float) -> float:
    """Points that an answer of this tenant may drop on average: its own, but no more than everybody's."""
    return budget if slo.budget is None else min(budget, slo.budget)


def budget_left(bank: Bank, budget: float, pending: float = 0.0) -> float:
    """The most points that one more request may drop; `pending` is reserved for running requests."""
    left = budget * (bank.served + CREDIT) - bank.spent - pending
    return left if left > 0.0 else 0.0


def affordable_level(drops: Sequence[float], budget: float) -> int:
    """The deepest level at which all requests may run for ever, or the first; `drops` by level never fall."""
    return max(0, bisect_right(drops, budget) - 1)


def price(left: float, budget: float) -> float:
    """What a point costs, in shares of a request's time that it must save, when so many points are left.

    0 while more than the credit is left. The price grows without bound as points run out, so that points go to the
    requests that save most time with them, and spending settles at the rate of the budget.
    """
    if left <= 0.0:
        return math.inf
    dear = budget * CREDIT / left - 1.0
    return dear if dear > 0.0 else 0.0


def charged(bank: Bank, drop: float, share: float = 1.0) -> Bank:
    """The bank after a request that ended with this drop, when a share of its answer had been given."""
    return Bank(bank.spent + drop, bank.served + share)
