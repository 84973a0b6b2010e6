"""What must hold of the scheduler's memory between two events. A pure check; it changes nothing.

The random-world tests call it after every event, and the engine after it has contained an error, to decide whether to
go on.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.kv_pages import coalesced
from dilaserve.scheduler.request_state import RequestState, Status
from dilaserve.scheduler.scheduler import Scheduler

ON_INSTANCE = (Status.RESIDENT, Status.STEPPING)
IN_STEP = (Status.STEPPING, Status.LEAVING)
TOLERANCE = 1e-6  # points of accuracy by which sums of reservations may differ


def violations(scheduler: Scheduler) -> list[str]:
    """A sentence for each invariant that does not hold; empty if the state is consistent."""
    placement, requests = scheduler.placement, scheduler.requests
    replicas = list(placement.all_replicas())
    found = [*counted(scheduler), *tenants(scheduler, replicas), *lines(scheduler)]
    places = Places(
        queue={id(row) for row in placement.queue},
        waiting={id(row) for row in placement.waiting},
        moving={id(row) for row in placement.moving},
        replicas={id(replica) for replica in replicas},
    )
    for name, state in requests.items():
        found += [f"request {name} {problem}" for problem in placed(state, places)]
    for replica in replicas:
        found += [f"instance {replica.instance.id} {problem}" for problem in consistent(replica, requests)]
    known = {id(state) for state in requests.values()}
    if not places.queue | places.waiting | places.moving <= known:
        found.append("a request waits that has ended")
    rows = [state.request.row for state in requests.values()]
    rows += [
        row.request.row for replica in replicas for row in replica.residents.values() if row.status is Status.LEAVING
    ]
    if len(set(rows)) != len(rows):
        found.append("two requests have the same row")
    return found


class Places(NamedTuple):
    """Where a request may be, by the identity of its `RequestState`; and the instances that there are."""

    queue: set[int]
    waiting: set[int]
    moving: set[int]
    replicas: set[int]


def placed(state: RequestState, places: Places) -> Iterator[str]:
    """A waiting request waits in one place, and one on an instance in none."""
    key, replica = id(state), state.replica
    waits = [name for name in ("queue", "waiting", "moving") if key in getattr(places, name)]
    if state.status is Status.WAITING:
        if len(waits) != 1:
            yield f"waits in {len(waits)} places"
        elif waits != ["moving"] and (waits == ["queue"]) != state.has_deadline:
            yield f"waits in the wrong line ({waits[0]})"
        if replica is not None:
            yield "waits, and is on an instance"
        return
    if state.status not in ON_INSTANCE:
        yield f"is {state.status.name.lower()}, and has not ended"
    if waits:
        yield f"is {state.status.name.lower()}, and waits ({waits[0]})"
    if replica is None or id(replica) not in places.replicas or replica.residents.get(state.request.row) is not state:
        yield "is on an instance that does not know it"


def consistent(replica: InstanceState, requests: dict[str, RequestState]) -> Iterator[str]:
    """Rows, their K/V, and the batch in flight of one instance agree."""
    rows, in_flight = list(replica.residents.values()), replica.in_flight or []
    for row in rows:
        ended = row.status is Status.LEAVING
        if ended == (requests.get(row.request.id) is row):
            yield f"holds request {row.request.id}, which is {'still known' if ended else 'not known'}"
        if (row.status in IN_STEP) != any(row is other for other in in_flight):
            yield f"holds request {row.request.id}, which is {row.status.name.lower()}, and its batch says otherwise"
    if any(replica.residents.get(key) is not row or row.request.row != key for key, row in replica.residents.items()):
        yield "keeps a row under another's number"
    if not {id(row) for row in in_flight} <= {id(row) for row in rows}:
        yield "steps a row that it does not hold"
    if {id(row) for row in replica.with_deadline} != {
        id(row) for row in rows if row.has_deadline and row.status in ON_INSTANCE
    }:
        yield "lists other rows with deadlines than it holds"
    if set(replica.pages.runs) != {row.kv_start for row in rows} or len(replica.pages.runs) != len(rows):
        yield "has K/V pages that no row owns, or a row without pages"
    pages = replica.pages
    whole = coalesced(sorted([*pages.free, *pages.runs.items(), *pages.kept.items()]))
    if whole != ([(0, replica.pages.capacity)] if replica.pages.capacity else []):
        yield "has pages that are free and taken, or neither"
    if not pages.kept.keys() <= pages.published.keys() <= {*pages.runs, *pages.kept}:
        yield "keeps or publishes K/V that nobody has"


def tenants(scheduler: Scheduler, replicas: list[InstanceState]) -> Iterator[str]:
    """What is kept by tenant is the sum over its requests."""
    held = Counter(row.request.slo.tenant for replica in replicas for row in replica.residents.values())
    if +scheduler.placement.held != held:
        yield "the rows that tenants hold are counted wrongly"
    reserved: Counter[str] = Counter()
    for state in scheduler.requests.values():
        reserved[state.request.slo.tenant] += state.reserved  # type: ignore[assignment]
    kept = scheduler.deadlines.ledger.reserved
    if any(abs(kept.get(name, 0.0) - reserved[name]) > TOLERANCE for name in {*kept, *reserved}):
        yield "the accuracy that tenants have reserved is summed wrongly"


def lines(scheduler: Scheduler) -> Iterator[str]:
    """What is kept beside the queue of deadlines, and of unfinished work, agrees with the requests."""
    queue, backlog, rows = scheduler.placement.queue, scheduler.placement.backlog, list(scheduler.requests.values())
    waiting = {state.request.row for state in queue}
    if queue.untested.keys() & queue.tested.keys() or queue.untested.keys() | queue.tested.keys() != waiting:
        yield "the queue of deadlines does not know which requests it has tested"
    timed = sum(row.seconds for row in rows if row.has_deadline)
    others = [row.seconds for row in rows if not row.has_deadline]
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
    if any(name != state.request.id for name, state in scheduler.requests.items()):
        yield "a request is known by another's name"
