"""In which order rows are served."""

import math
from collections.abc import Callable

import msgspec


class Place(msgspec.Struct, frozen=True, gc=False):
    """What an order may look at: arrival, deadline (infinity: none), and the seconds the row needs alone."""

    arrived_at: float
    deadline: float
    seconds: float


HEAD_START = 60.0  # seconds that one level of priority counts as having arrived earlier, so that no level starves


def without_deadline(arrived_at: float, weight: float) -> float:
    """The order of a tenant's requests without a deadline: by arrival, with a head start for priority."""
    return arrived_at - HEAD_START * math.log2(weight)


Order = Callable[[Place], float]


def fcfs(place: Place) -> float:
    return place.arrived_at


def edf(place: Place) -> float:
    return place.deadline


def least_slack(place: Place) -> float:
    return place.deadline - place.seconds


ORDERS: dict[str, Order] = {"fcfs": fcfs, "edf": edf, "least-slack": least_slack, "composed": edf}
