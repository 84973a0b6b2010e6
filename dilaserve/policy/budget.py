"""The accuracy bank of a tenant: how far thresholds may be lowered, enforced and not hoped for."""

from typing import NamedTuple

CREDIT = 50  # requests' worth of drop that a new tenant may spend in advance
RATE = 0.02  # of the price, per completion


class Bank(NamedTuple):
    """Percentage points spent so far, requests served, and the price of one more point."""

    spent: float = 0.0
    served: int = 0
    price: float = 0.0


def room(bank: Bank, budget: float, pending: float = 0.0) -> float:
    """The most points that one more request may drop; `pending` is promised to running requests."""
    left = budget * (bank.served + CREDIT) - bank.spent - pending
    return max(0.0, min(left, 1.0 / bank.price) if bank.price else left)


def settled(bank: Bank, drop: float, budget: float) -> Bank:
    """The bank after a request that ended with this drop (drift plus penalty)."""
    return Bank(bank.spent + drop, bank.served + 1, max(0.0, bank.price + RATE * (drop - budget)))
