"""In which order rows are served."""

from collections.abc import Callable

import msgspec


class Place(msgspec.Struct, frozen=True, gc=False):
    """What an order may look at: arrival, deadline (infinity: none), and the seconds the row needs alone."""

    arrived_at: float
    deadline: float
    seconds: float


Order = Callable[[Place], float]


def fcfs(place: Place) -> float:
    return place.arrived_at


def edf(place: Place) -> float:
    return place.deadline


def least_slack(place: Place) -> float:
    return place.deadline - place.seconds


ORDERS: dict[str, Order] = {"fcfs": fcfs, "edf": edf, "least-slack": least_slack, "composed": edf}
