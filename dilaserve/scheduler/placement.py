"""Who is in the house: the rows that wait, the instances, and who has a seat on which."""

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter

from dilaserve.config import Config
from dilaserve.scheduler.backlog import Backlog
from dilaserve.scheduler.deadline_queue import DeadlineQueue
from dilaserve.scheduler.deadlines import Promises
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.request_state import Did, Progress, Seat, State
from dilaserve.scheduler.rules.admission import Room, Tenant, fits, least_loaded
from dilaserve.scheduler.rules.fairness import Turns, gives_way, granted, in_turn
from dilaserve.scheduler.rules.ordering import ORDERS, without_deadline
from dilaserve.scheduler.waiting_queue import Line
from dilaserve.types import Instance, Load

LOOKS = 8  # requests at the head of the queue that each decision tests on the instances between two steps
TESTS = 300  # arrival tests of one request on one instance that a decision makes at most; about 2 µs each
PLACED = 32  # requests without admitted deadlines that a decision gives rows to, at most; about 20 µs each
WINDOW = 64  # requests that failed the test and that a tick tests again, at most
STALE = 10.0  # seconds without a step after which what is believed of an instance may be wrong
FARTHEST = 10.0  # times too long that a step may seem to take
ARRIVAL = attrgetter("request.arrived_at")


class House:
    """Gives seats to those who wait, and takes them back.

    Rows with a promise get a seat where their deadline holds, the others where room is.
    """

    def __init__(self, config: Config, promises: Promises) -> None:
        self.promises, self.beliefs = promises, promises.beliefs
        self.max_rows = config.device.max_num_seqs
        self.max_promised = config.scheduler.guaranteed_rows
        self.age = config.scheduler.best_effort_age
        self.waiting = Line(turn)  # without a promised deadline
        self.queue = DeadlineQueue(promises.rank)  # with one
        self.hopeless = Expiry()  # requests of the queue, by when they can no longer end in time
        self.backlog = Backlog()
        self.turns = Turns()  # of tenants
        self.held: Counter[str] = Counter()  # rows on instances, by tenant
        self.moving: list[Progress] = []  # rows of an old plan that wait for the new one to stand
        self.seats: dict[int, Seat] = {}
        self.closing: dict[int, Seat] = {}  # instances of an old plan that finish their step in flight
        self.places_more = False  # there was more to place than one decision does
        self.kept: Seat | None = None  # takes no promises until who has waited for too long finds room on it

    def reseated(self) -> None:
        self.promises.degrees = tuple(sorted({seat.degree for seat in self.seats.values()})) or (self.beliefs.base,)

    def instances(self) -> list[Instance]:
        return [seat.instance for seats in (self.seats, self.closing) for seat in seats.values()]

    @property
    def running(self) -> int:
        """Requests that have a row on an instance and have not ended."""
        seats = [*self.seats.values(), *self.closing.values()]
        return sum(row.state is not State.LEAVING for seat in seats for row in seat.residents.values())

    def place(self, now: float, everywhere: bool) -> None:
        """Give seats to those who wait: promised rows where their deadline holds, then the others where room is."""
        first = self.place_aged(now)
        if self.promises.admits:
            self.place_promised(now, everywhere)
            self.place_rest(self.waiting.by_turn(self.turns, self.beliefs.unloaded))
        else:
            self.place_rest(self.unadmitted(first))

    def unadmitted(self, first: Progress | None) -> Iterator[Progress]:
        """All that wait, with and without deadlines, in the order in which they get rows; `first` goes before all."""
        names = dict.fromkeys([*self.queue.lines, *self.waiting.lines])
        lines = {name: self.line_of(name) for name in names}
        rest = in_turn(lines, self.turns, self.beliefs.unloaded)
        return chain([first] if first else [], (progress for progress in rest if progress is not first))

    def line_of(self, tenant: str) -> Iterator[Progress]:
        """A tenant's requests in the order of service where deadlines are not tested; those that missed theirs last."""
        timed = [progress for _, progress in self.queue.lines.get(tenant, ())]
        others = [progress for _, progress in self.waiting.lines.get(tenant, ())]
        timely = (progress for progress in others if not progress.late)
        late = (progress for progress in others if progress.late)
        if self.promises.order is ORDERS["fcfs"]:
            return chain(heapq.merge(timed, timely, key=arrival_turn), late)
        return chain(timed, timely, late)

    def place_aged(self, now: float) -> Progress | None:
        """A best-effort request that has waited for too long gets a row before requests with deadlines do.

        Returns it if there was no room; an instance without such a row then takes no deadlines until there is.
        """
        self.kept = None
        if not self.waiting or now - self.waiting.since <= self.age:
            return None
        rows = self.waiting.by_turn(self.turns, self.beliefs.unloaded)
        first = next((row for row in rows if self.aged(row, now) and self.ever_fits(row)), None)
        if first is None:
            return None
        if seat := self.seat_for(first):
            self.waiting.remove(first)
            self.seat(first, seat)
            return None
        seats = [seat for seat in self.seats.values() if self.holds(seat, first) and not self.has_aged(seat, now)]
        self.kept = min(seats, key=lambda seat: len(seat.residents), default=None)
        return first

    def has_aged(self, seat: Seat, now: float) -> bool:
        """Whether a best-effort row of the instance has waited for too long: one at a time may keep deadlines out."""
        return any(self.aged(row, now) for row in seat.residents.values() if not row.promised)

    def aged(self, progress: Progress, now: float) -> bool:
        return now - progress.request.arrived_at > self.age

    @property
    def open(self) -> list[Seat]:
        """The instances that take promises."""
        return [seat for seat in self.seats.values() if seat is not self.kept]

    def place_promised(self, now: float, everywhere: bool) -> None:
        """Test those that wait with a deadline, as many as a decision may.

        Newcomers are tested on every instance; those at the head of the queue on the instances between two steps; at a
        tick (`everywhere`) those whose last test is longest ago on every instance again.
        """
        queue = self.queue
        if not queue:
            return
        idle = [seat for seat in self.open if seat.flying is None]
        head = list(islice(queue.by_turn(self.turns, self.beliefs.unloaded), LOOKS)) if idle else []
        looked = self.affordable([*queue.next_untested(WINDOW), *(queue.next_tested(WINDOW) if everywhere else ())])
        tenants: dict[int, list[Tenant]] = {}
        for progress in queue.in_order([*head, *looked.values()], self.turns, self.beliefs.unloaded):
            seats = self.open if progress.request.row in looked else idle
            if not self.place_one(progress, seats, tenants, now) and progress.request.row in looked:
                queue.failed(progress)

    def affordable(self, some: Sequence[Progress]) -> dict[int, Progress]:
        """The first of these, by row, as many as a decision may test on all instances; one at least."""
        found: dict[int, Progress] = {}
        tests = 0
        for progress in some:
            if tests >= TESTS:
                break
            tests += len(self.seats) * len(progress.thresholds)
            found[progress.request.row] = progress
        return found

    def place_one(
        self, progress: Progress, seats: Sequence[Seat], tenants: dict[int, list[Tenant]], now: float
    ) -> bool:
        """Give the request a row on the best of these instances that keep its deadline and have room, if one does."""
        found = self.seats_with_slack(progress, seats, tenants, now)
        seat = next((seat for seat in found if self.make_room(seat, progress, now)), None)
        if seat is None:
            seat = self.seat_for_hopeless(progress, now)
            if seat is None or not self.make_room(seat, progress, now):
                return False
        self.queue.remove(progress)
        self.seat(progress, seat)
        tenants.pop(seat.instance.id, None)
        return True

    def any_with_slack(self, progress: Progress, now: float) -> bool:
        """Whether an instance would keep the deadline, with its room made free if need be."""
        return any(True for _ in self.seats_with_slack(progress, self.open, {}, now))

    def enter(self, progress: Progress) -> None:
        """Wait in the order of service, or of arrival and priority without a deadline."""
        if not progress.promised:
            self.waiting.add(progress)
            return
        self.queue.add(progress)
        if self.promises.sheds:
            self.hopeless.add(progress, self.promises.hopeless_at(progress), self.backlog.unfinished)

    def leave(self, progress: Progress) -> None:
        """Wait no longer; with a seat, want no time of it, and hold it until the batch is done."""
        if progress.seat is None:
            home = self.queue if progress.promised else self.waiting
            (self.moving if progress in self.moving else home).remove(progress)
        elif progress.promised:
            progress.seat.promised.remove(progress)

    def seat_for_hopeless(self, progress: Progress, now: float) -> Seat | None:
        """Estimates may be wrong: where nobody has a promise, trying costs nobody anything, and teaches.

        None for a request that is not hopeless: it waits for a seat that keeps its slack.
        """
        seats = self.open
        if self.promises.shed and (all(seat.promised for seat in seats) or self.promises.is_past(progress, now)):
            return None
        if not self.promises.is_hopeless(progress, now):
            return None
        return min(
            [seat for seat in seats if self.holds(seat, progress)], key=lambda seat: len(seat.promised), default=None
        )

    def tries(self, progress: Progress, now: float) -> bool:
        """Whether a request that seems hopeless is worth a try: an instance has stood idle for long, and what is
        believed of it may be out of date, as nothing is learned from those who are turned away.
        """
        stale = any(not seat.residents and now > seat.launched_at + STALE for seat in self.open)
        return stale and progress.left(now) * FARTHEST > self.beliefs.unloaded(progress)

    def place_rest(self, rows: Iterable[Progress]) -> None:
        """In order, until one finds no room, or as many have found some as a decision may place.

        Who is too large for all instances, as workers came back with less memory, holds nobody up.
        """
        placed, self.places_more = 0, False
        for progress in rows if self.seats else ():
            if placed == PLACED:
                self.places_more = True
                break
            if seat := self.seat_for(progress) or self.seat_of_another(progress):
                (self.queue if progress.promised else self.waiting).remove(progress)
                self.seat(progress, seat)
                placed += 1
            elif self.ever_fits(progress):
                break

    def seat_of_another(self, progress: Progress) -> Seat | None:
        """A tenant without any row gets that of a tenant with several, between two steps; it waits no longer than one.

        The evicted row, the last to come, keeps its tokens and waits again.
        """
        tenant = progress.request.slo.tenant
        if self.held[tenant] or max(self.held.values(), default=0) < 2:
            return None
        for seat in self.seats.values():
            starts = [row.kv_start for row in self.surplus_rows(seat)]
            if not seat.pages.fits_without(progress.request.canvas_tokens, starts):
                continue
            while victim := self.surplus(seat):
                self.evict(victim, seat)
                kv_start = seat.pages.take(progress.request.canvas_tokens)
                if kv_start is not None:
                    progress.kv_start = kv_start
                    return seat
        return None

    def surplus(self, seat: Seat) -> Progress | None:
        """The row that came last, of the tenant with most rows, if that has several."""
        rows = self.surplus_rows(seat)
        return max(rows, key=lambda row: (self.held[row.request.slo.tenant], ARRIVAL(row)), default=None)

    def surplus_rows(self, seat: Seat) -> list[Progress]:
        """Rows of tenants that have several, which may be evicted."""
        return [
            row
            for row in seat.residents.values()
            if row.state is State.RESIDENT
            and self.held[row.request.slo.tenant] > 1
            and not (row.promised and self.promises.admits)
        ]

    def evict(self, progress: Progress, seat: Seat) -> None:
        """The row waits again; its next step refreshes."""
        self.unseat(progress, seat)
        progress.did(Did.EVICTED)
        self.enter(progress)

    def gives_way(self, tenant: str) -> Progress | None:
        """The waiting request that makes room in a full queue for one of this tenant: the last to come that has not
        started, of the tenant that holds most places.
        """
        waiting = Counter(self.queue.counts()) + Counter(self.waiting.counts())
        held = waiting + self.held
        while loser := gives_way(waiting, held, tenant):
            rows = [row for line in (self.queue, self.waiting) for _, row in line.lines.get(loser, ())]
            if fresh := [row for row in rows if row.started_at is None]:
                return max(fresh, key=ARRIVAL)
            del waiting[loser]
        return None

    def ever_fits(self, progress: Progress) -> bool:
        """Whether an instance holds the canvas when nobody else is there."""
        return any(self.holds(seat, progress) for seat in self.seats.values())

    def holds(self, seat: Seat, progress: Progress) -> bool:
        """Whether the instance has K/V for the canvas when nobody else is there."""
        return seat.pages.ever_fits(progress.request.canvas_tokens)

    def seat_for(self, progress: Progress) -> Seat | None:
        """The emptiest instance with room for the canvas, whose pages are taken; a fast one may be fuller."""
        degrees = self.promises.degrees
        seconds = {degree: self.beliefs.unloaded(progress, degree) for degree in degrees} if len(degrees) > 1 else {}
        rooms = [
            Room(id, len(seat.residents), self.max_rows * seat.degree, seconds.get(seat.degree, 1.0))
            for id, seat in self.seats.items()
        ]
        for id in least_loaded(rooms):
            kv_start = self.seats[id].pages.take(progress.request.canvas_tokens)
            if kv_start is not None:
                progress.kv_start = kv_start
                return self.seats[id]
        return None

    def seats_with_slack(
        self, progress: Progress, seats: Sequence[Seat], tenants: dict[int, list[Tenant]], now: float
    ) -> Iterator[Seat]:
        """The instances that pass the test and can hold the canvas, at the highest threshold first, most slack first.

        `tenants` keeps the rows of the instances that were looked at.
        """
        looked = [seat for seat in seats if len(seat.promised) < self.max_promised and self.holds(seat, progress)]
        if not looked:
            return
        loads = {degree: self.beliefs.loads(progress, degree) for degree in {seat.degree for seat in looked}}
        paces = {degree: self.beliefs.pace(degree).fixed for degree in loads}
        for seat in looked:
            if seat.instance.id not in tenants:
                tenants[seat.instance.id] = self.tenants(seat, now)
        deepest = self.promises.deepest(progress)
        for level in range(min(self.promises.floor, deepest), deepest + 1):
            found: list[tuple[float, int]] = []
            for seat in looked:
                newcomer = tenant(progress, loads[seat.degree][level], max(now, seat.ends_at))
                slack = fits(newcomer, tenants[seat.instance.id], paces[seat.degree])
                if slack is not None:
                    found.append((slack, -seat.instance.id))
            for _, id in sorted(found, reverse=True):
                yield self.seats[-id]

    def tenants(self, seat: Seat, now: float) -> list[Tenant]:
        """The rows with deadlines, as they are when the step in flight ends."""
        loads, at = self.beliefs.loads, max(now, seat.ends_at)
        return [tenant(row, self.need_after_step(row, loads(row, seat.degree)[row.level]), at) for row in seat.promised]

    def need_after_step(self, row: Progress, need: Load) -> Load:
        """What the row needs beside the step in flight, if it is in it."""
        if row.state is not State.STEPPING or row.seat is None:
            return need
        added = row.seat.added.get(row.request.row, 0.0)
        return Load(max(0.0, need.steps - 1.0), max(0.0, need.work - added))

    def make_room(self, seat: Seat, progress: Progress, now: float) -> bool:
        """Take pages and a row, if need be from best-effort rows, the last to come first; their next step refreshes.

        Nobody is evicted if that is not enough.
        """
        canvas = progress.request.canvas_tokens
        rows = self.evictable(seat, now)
        starts = [row.kv_start for row in rows]
        over = max(0, len(seat.residents) + 1 - self.max_rows * seat.degree)  # rows that must go in any case
        if over > len(rows) or not seat.pages.fits_without(canvas, starts):
            return False
        enough = bisect_left(
            range(over, len(rows)), True, key=lambda count: seat.pages.fits_without(canvas, starts[:count])
        )
        for row in rows[: over + enough]:
            self.evict(row, seat)
        kv_start = seat.pages.take(canvas)
        assert kv_start is not None, "pages that were counted as free are not"
        progress.kv_start = kv_start
        return True

    def evictable(self, seat: Seat, now: float) -> list[Progress]:
        """Best-effort rows between two steps, the last to come first; the first of all stays if it has aged."""
        rest = sorted([row for row in seat.residents.values() if not row.promised], key=ARRIVAL, reverse=True)
        if rest and self.aged(rest[-1], now):
            rest.pop()
        return [row for row in rest if row.state is State.RESIDENT]

    def seat(self, progress: Progress, seat: Seat) -> None:
        tenant = progress.request.slo.tenant
        if not progress.charged:
            progress.charged = True
            self.turns = granted(self.turns, tenant, self.beliefs.unloaded(progress))
        self.held[tenant] += 1
        progress.did(Did.PLACED)
        progress.seat = seat
        seat.residents[progress.request.row] = progress
        if progress.promised:
            insort(seat.promised, progress, key=self.promises.rank)

    def unseat(self, progress: Progress, seat: Seat) -> None:
        del seat.residents[progress.request.row]
        tenant = progress.request.slo.tenant
        self.held[tenant] -= 1
        if not self.held[tenant]:
            del self.held[tenant]
        if progress in seat.promised:
            seat.promised.remove(progress)
        seat.pages.give(progress.kv_start)
        progress.seat, progress.fresh, progress.loads, progress.ready = None, False, None, None

    def doom(self, rank: int) -> None:
        """The worker is gone: nothing more is launched on its instance, which is lost once its peers have left it."""
        for seat in chain(self.seats.values(), self.closing.values()):
            seat.doomed |= rank in seat.instance.ranks

    def move_to(self, instance: Instance, forming: Iterable[Instance]) -> None:
        """Rows of an old plan go on: an instance that stands takes its part, by devices, of what fits on it, and leaves
        the others to those that are still to stand.
        """
        pages, mine = self.seats[instance.id].pages, len(instance.ranks)
        coming = {rank for other in (*forming, *self.closing_instances()) for rank in other.ranks}
        fitting = [row for row in self.moving if pages.ever_fits(row.request.canvas_tokens)]
        fitting.sort(key=lambda row: (row.left(0.0), ARRIVAL(row)))
        part = fitting[: math.ceil(len(fitting) * mine / (mine + len(coming)))]
        self.moving = [row for row in self.moving if row not in part]
        self.wait_again(part)

    def closing_instances(self) -> list[Instance]:
        return [seat.instance for seat in self.closing.values()]

    def wait_again(self, rows: list[Progress]) -> None:
        """Rows that had a seat go back into the order that they were in."""
        for progress in rows:
            self.enter(progress)

    def demote(self, progress: Progress) -> None:
        """The row has lost its promise and goes on without one."""
        self.leave(progress)
        self.backlog.remove(progress)
        progress.promised, progress.late = False, True
        self.backlog.add(progress)
        if progress.seat is None:
            self.enter(progress)


def arrival_turn(progress: Progress) -> float:
    """The order of arrival, in which priority counts without a deadline."""
    return ARRIVAL(progress) if progress.promised else turn(progress)


def turn(progress: Progress) -> float:
    """The order of a tenant's rows without a promised deadline."""
    request = progress.request
    return without_deadline(request.arrived_at, request.slo.weight)


def tenant(progress: Progress, need: Load, now: float) -> Tenant:
    return Tenant(progress.left(now), need.steps, need.work, progress.request.slo.weight)
