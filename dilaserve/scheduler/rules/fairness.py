"""How tenants share rows, places in the queue, and the time of a step. A tenant alone gets everything.

Rows go out by start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): each grant moves its tenant ahead by the
seconds of the request, and the tenant that is least far ahead is next. Steps are shared by deficit round robin
(Shreedhar, Varghese, SIGCOMM 1995).
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Turns(NamedTuple):
    """`clock` is the start of the last grant, in seconds of service; `until` holds the tenants ahead of it."""

    clock: float = 0.0
    until: Mapping[str, float] = {}


def start(turns: Turns, tenant: str) -> float:
    """The key of a tenant's next grant; the smallest is next. Time without requests earns a tenant nothing."""
    return max(turns.clock, turns.until.get(tenant, 0.0))


def granted(turns: Turns, tenant: str, seconds: float) -> Turns:
    """After a grant of a row to a request that takes so many seconds alone."""
    begins = start(turns, tenant)
    ahead = {name: until for name, until in turns.until.items() if until > begins}
    return Turns(begins, {**ahead, tenant: begins + seconds})


def in_turn(lines: Mapping[str, Iterable[T]], turns: Turns, seconds: Callable[[T], float]) -> Iterator[T]:
    """All that wait, in the order in which they get rows; each tenant's line keeps its own order."""
    if len(lines) == 1:
        yield from next(iter(lines.values()))
        return
    places = [(start(turns, tenant), number, iter(line)) for number, (tenant, line) in enumerate(lines.items())]
    heapq.heapify(places)
    while places:
        begins, number, line = heapq.heappop(places)
        for one in line:
            yield one
            heapq.heappush(places, (begins + seconds(one), number, line))
            break


def gives_way(waiting: Mapping[str, int], held: Mapping[str, int], newcomer: str) -> str | None:
    """The tenant that loses a waiting request when every place is taken and the newcomer wants one.

    It is the one that holds most places, of those with requests waiting. None: the newcomer is refused, as its tenant
    would hold as many.
    """
    most = max(waiting, key=lambda tenant: (held.get(tenant, 0), waiting[tenant]), default=None)
    if most is None or most == newcomer or held.get(most, 0) <= held.get(newcomer, 0) + 1:
        return None
    return most


class Ride(NamedTuple):
    """A row that could be in the next step, and the seconds that it would add."""

    tenant: str
    seconds: float


def allowances(rides: Sequence[Ride], credits: Mapping[str, float], fixed: float) -> dict[str, float]:
    """Seconds of the next step by tenant, so that at least one row can go; `credits` are left from the steps before.

    A round gives each tenant what the least demanding one asks for, or the step's fixed seconds if that is more: rows
    within those ride almost for free.
    """
    wants: dict[str, float] = {}
    least: dict[str, float] = {}
    for tenant, seconds in rides:
        wants[tenant] = wants.get(tenant, 0.0) + seconds
        least.setdefault(tenant, seconds)
    quantum = max(fixed, min(wants.values()), 1e-9)
    missing = min((least[tenant] - credits.get(tenant, 0.0)) / quantum for tenant in wants)
    rounds = max(1, math.ceil(missing - 1e-9))
    return {tenant: credits.get(tenant, 0.0) + rounds * quantum for tenant in wants}


def riders(rides: Sequence[Ride], allowed: Mapping[str, float]) -> list[int]:
    """Places of the rows that their tenants' allowances pay for: the first row of each tenant, then the second …"""
    left, closed, turn = dict(allowed), set[str](), dict[str, int]()
    found: list[tuple[int, int]] = []
    for place, (tenant, seconds) in enumerate(rides):
        if tenant in closed or seconds > left[tenant] + 1e-9:
            closed.add(tenant)
            continue
        left[tenant] -= seconds
        turn[tenant] = turn.get(tenant, 0) + 1
        found.append((turn[tenant], place))
    return [place for _, place in sorted(found)]


def left_over(rides: Sequence[Ride], allowed: Mapping[str, float], rode: Sequence[int]) -> dict[str, float]:
    """The credits after a step of the rows at these places; no more than a tenant's largest row asks for."""
    left, largest = dict(allowed), dict.fromkeys(allowed, 0.0)
    for place in rode:
        left[rides[place].tenant] -= rides[place].seconds
    for tenant, seconds in rides:
        largest[tenant] = max(largest[tenant], seconds)
    return {tenant: min(largest[tenant], max(0.0, left[tenant])) for tenant in left}
