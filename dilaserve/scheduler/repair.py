"""Makes the scheduler's lists and counts agree again after a handler stopped half-way.

Its input is what each request and each batch in flight says of itself; everything that is derived from that is made
anew. It decides nothing: rows keep their tokens, and a row whose step never began, or was lost, refreshes.

1. Rows on an instance that ended, or that are in no batch although they say so, are put right or taken off.
2. Requests that say they are on an instance which does not know them wait again.
3. The waiting lines, the promises and pages of each instance, and what is kept by tenant are made anew.
"""

from collections import Counter
from collections.abc import Mapping

from dilaserve.scheduler.backlog import Backlog
from dilaserve.scheduler.deadline_queue import DeadlineQueue
from dilaserve.scheduler.deadlines import Promises
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.placement import House, turn
from dilaserve.scheduler.request_state import Progress, Seat, State
from dilaserve.scheduler.waiting_queue import Line


def repair(house: House, requests: Mapping[str, Progress]) -> list[int]:
    """Returns rows of the request table that nobody uses any more and that nobody has given back."""
    seats = [*house.seats.values(), *house.closing.values()]
    free = [row for seat in seats for row in settle(seat, requests)]
    for progress in requests.values():
        if not is_held(progress, seats):
            wait(progress)
    for seat in seats:
        derive(seat, house)
    reserve(house.promises, requests)
    house.held = Counter(row.request.slo.tenant for seat in seats for row in seat.residents.values())
    moving = {id(row) for row in house.moving}
    house.moving = [row for row in requests.values() if row.state is State.WAITING and id(row) in moving]
    house.queue, house.waiting, house.hopeless = DeadlineQueue(house.promises.rank), Line(turn), Expiry()
    for progress in requests.values():
        if progress.state is State.WAITING and id(progress) not in moving:
            house.enter(progress)
    house.backlog = Backlog()
    for progress in requests.values():
        house.backlog.add(progress)
    return free


def settle(seat: Seat, requests: Mapping[str, Progress]) -> list[int]:
    """Rows agree with the batch in flight; returns those that have ended and are in no step any more."""
    free = []
    flying = {id(row) for row in seat.flying or ()}
    for key, row in list(seat.residents.items()):
        if id(row) in flying:
            row.state = State.STEPPING if requests.get(row.request.id) is row else State.LEAVING
        elif requests.get(row.request.id) is row and row.seat is seat:
            if row.state is not State.RESIDENT:
                row.state = State.RESIDENT
                refresh(row)
        else:
            del seat.residents[key]
            if row.state is State.LEAVING:
                row.state = State.GONE
                free.append(key)
    return free


def is_held(progress: Progress, seats: list[Seat]) -> bool:
    seat = progress.seat
    return any(seat is one for one in seats) and seat.residents.get(progress.request.row) is progress  # type: ignore[union-attr]


def wait(progress: Progress) -> None:
    progress.state, progress.seat = State.WAITING, None
    refresh(progress)


def refresh(progress: Progress) -> None:
    """The next step computes the row's K/V anew, and nothing that was worked out for it holds."""
    progress.fresh, progress.loads, progress.ready = False, None, None


def reserve(promises: Promises, requests: Mapping[str, Progress]) -> None:
    """The accuracy that running requests may still spend, by tenant and in all."""
    promises.reserved = {}
    for progress in requests.values():
        if progress.reserved:
            tenant = progress.request.slo.tenant
            promises.reserved[tenant] = promises.reserved.get(tenant, 0.0) + progress.reserved
    promises.pending = sum(promises.reserved.values())


def derive(seat: Seat, house: House) -> None:
    """The promises of an instance in the order of service, and the pages that its rows own."""
    rows = seat.residents.values()
    promised = [row for row in rows if row.promised and row.state is not State.LEAVING]
    seat.promised[:] = sorted(promised, key=house.promises.rank)
    for start in set(seat.pages.runs) - {row.kv_start for row in rows}:
        seat.pages.give(start)
