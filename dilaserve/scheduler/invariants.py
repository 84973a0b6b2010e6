"""What must hold of the scheduler's memory between two events. A pure check; it changes nothing.

The random-world tests call it after every event, and the engine after it has contained an error, to decide whether to
go on.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dilaserve.scheduler.kv_pages import joined
from dilaserve.scheduler.request_state import Progress, Seat, State
from dilaserve.scheduler.scheduler import Scheduler

ON_INSTANCE = (State.RESIDENT, State.STEPPING)
IN_STEP = (State.STEPPING, State.LEAVING)
TOLERANCE = 1e-6  # points of accuracy by which sums of reservations may differ


def violations(scheduler: Scheduler) -> list[str]:
    """A sentence for each invariant that does not hold; empty if the state is consistent."""
    house, requests = scheduler.house, scheduler.requests
    seats = [*house.seats.values(), *house.closing.values()]
    found = [*counted(scheduler), *tenants(scheduler, seats), *lines(scheduler)]
    places = Places(
        queue={id(row) for row in house.queue},
        waiting={id(row) for row in house.waiting},
        moving={id(row) for row in house.moving},
        seats={id(seat) for seat in seats},
    )
    for name, progress in requests.items():
        found += [f"request {name} {problem}" for problem in placed(progress, places)]
    for seat in seats:
        found += [f"instance {seat.instance.id} {problem}" for problem in seated(seat, requests)]
    known = {id(progress) for progress in requests.values()}
    if not places.queue | places.waiting | places.moving <= known:
        found.append("a request waits that has ended")
    rows = [progress.request.row for progress in requests.values()]
    rows += [row.request.row for seat in seats for row in seat.residents.values() if row.state is State.LEAVING]
    if len(set(rows)) != len(rows):
        found.append("two requests have the same row")
    return found


class Places(NamedTuple):
    """Where a request may be, by the identity of its progress; and the instances that there are."""

    queue: set[int]
    waiting: set[int]
    moving: set[int]
    seats: set[int]


def placed(progress: Progress, places: Places) -> Iterator[str]:
    """A waiting request waits in one place, and one on an instance in none."""
    key, seat = id(progress), progress.seat
    waits = [name for name in ("queue", "waiting", "moving") if key in getattr(places, name)]
    if progress.state is State.WAITING:
        if len(waits) != 1:
            yield f"waits in {len(waits)} places"
        elif waits != ["moving"] and (waits == ["queue"]) != progress.promised:
            yield f"waits in the wrong line ({waits[0]})"
        if seat is not None:
            yield "waits, and is on an instance"
        return
    if progress.state not in ON_INSTANCE:
        yield f"is {progress.state.name.lower()}, and has not ended"
    if waits:
        yield f"is {progress.state.name.lower()}, and waits ({waits[0]})"
    if seat is None or id(seat) not in places.seats or seat.residents.get(progress.request.row) is not progress:
        yield "is on an instance that does not know it"


def seated(seat: Seat, requests: dict[str, Progress]) -> Iterator[str]:
    """Rows, their K/V, and the batch in flight of one instance agree."""
    rows, flying = list(seat.residents.values()), seat.flying or []
    for row in rows:
        ended = row.state is State.LEAVING
        if ended == (requests.get(row.request.id) is row):
            yield f"holds request {row.request.id}, which is {'still known' if ended else 'not known'}"
        if (row.state in IN_STEP) != any(row is other for other in flying):
            yield f"holds request {row.request.id}, which is {row.state.name.lower()}, and its batch says otherwise"
    if any(seat.residents.get(key) is not row or row.request.row != key for key, row in seat.residents.items()):
        yield "keeps a row under another's number"
    if not {id(row) for row in flying} <= {id(row) for row in rows}:
        yield "steps a row that it does not hold"
    if {id(row) for row in seat.promised} != {id(row) for row in rows if row.promised and row.state in ON_INSTANCE}:
        yield "keeps other promises than its rows have"
    if set(seat.pages.runs) != {row.kv_start for row in rows} or len(seat.pages.runs) != len(rows):
        yield "has K/V pages that no row owns, or a row without pages"
    whole = joined(sorted([*seat.pages.free, *seat.pages.runs.items()]))
    if whole != ([(0, seat.pages.capacity)] if seat.pages.capacity else []):
        yield "has pages that are free and taken, or neither"


def tenants(scheduler: Scheduler, seats: list[Seat]) -> Iterator[str]:
    """What is kept by tenant is the sum over its requests."""
    held = Counter(row.request.slo.tenant for seat in seats for row in seat.residents.values())
    if +scheduler.house.held != held:
        yield "the rows that tenants hold are counted wrongly"
    reserved: Counter[str] = Counter()
    for progress in scheduler.requests.values():
        reserved[progress.request.slo.tenant] += progress.reserved  # type: ignore[assignment]
    kept = scheduler.promises.reserved
    if any(abs(kept.get(name, 0.0) - reserved[name]) > TOLERANCE for name in {*kept, *reserved}):
        yield "the accuracy that tenants have reserved is summed wrongly"


def lines(scheduler: Scheduler) -> Iterator[str]:
    """What is kept beside the queue of deadlines, and of unfinished work, agrees with the requests."""
    queue, backlog, rows = scheduler.house.queue, scheduler.house.backlog, list(scheduler.requests.values())
    waiting = {progress.request.row for progress in queue}
    if queue.untested.keys() & queue.tested.keys() or queue.untested.keys() | queue.tested.keys() != waiting:
        yield "the queue of deadlines does not know whom it has tested"
    timed = sum(row.seconds for row in rows if row.promised)
    others = [row.seconds for row in rows if not row.promised]
    same = near(backlog.timed, timed) and near(backlog.best_effort, sum(others))
    if not same or (backlog.requests, backlog.unfinished) != (len(others), len(rows)):
        yield "the work that is not done yet is summed wrongly"


def near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(1.0, one, other)


def counted(scheduler: Scheduler) -> Iterator[str]:
    """Every request that came is known or has one fate."""
    totals = scheduler.totals
    if totals.received != sum(totals.fates.values()) + len(scheduler.requests):
        yield "the requests that came are not those that ended and those that are known"
    if any(name != progress.request.id for name, progress in scheduler.requests.items()):
        yield "a request is known by another's name"
