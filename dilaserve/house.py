"""Who is in the house: the rows that wait, the instances, and who has a seat on which."""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter

from dilaserve.config import Config
from dilaserve.line import Line
from dilaserve.policy.admission import Room, Tenant, fits, least_loaded
from dilaserve.policy.fairness import Turns, gives_way, granted, in_turn
from dilaserve.policy.ordering import without_deadline
from dilaserve.progress import Did, Progress, Seat, State
from dilaserve.promises import Promises
from dilaserve.terms import Instance, Load

LOOKS = 8  # waiting requests that a decision may test in vain
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
        self.queue = Line(promises.rank)  # with one
        self.turns = Turns()  # of tenants
        self.held: Counter[str] = Counter()  # rows on instances, by tenant
        self.moving: list[Progress] = []  # rows of an old plan that wait for the new one to stand
        self.seats: dict[int, Seat] = {}
        self.closing: dict[int, Seat] = {}  # instances of an old plan that finish their step in flight
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
            self.place_rest(self.untested(first))

    def untested(self, first: Progress | None) -> Iterable[Progress]:
        """All that wait, with and without deadlines, in the order in which they get rows; `first` goes before all."""
        rank, lines = self.promises.rank, dict[str, list[Progress]]()
        for progress in sorted([*self.queue, *self.waiting], key=lambda row: (row.late, rank(row), turn(row))):
            if progress is not first:
                lines.setdefault(progress.request.slo.tenant, []).append(progress)
        rest = in_turn(lines, self.turns, self.beliefs.unloaded)
        return rest if first is None else chain([first], rest)

    def place_aged(self, now: float) -> Progress | None:
        """Whoever has waited for too long goes before promises, one at a time in the house, so that none starves.

        Returns who found no room yet.
        """
        self.kept = None
        if not self.waiting or now - self.waiting.since <= self.age:
            return None
        rows = self.waiting.by_turn(self.turns, self.beliefs.unloaded)
        first = next((row for row in rows if self.aged(row, now) and self.ever_fits(row)), None)
        if first is None:
            return None
        seats = list(self.seats.values())
        if any(self.aged(row, now) for seat in seats for row in seat.residents.values() if not row.promised):
            return None
        if seat := self.seat_for(first):
            self.waiting.remove(first)
            self.seat(first, seat)
            return None
        self.kept = min(seats, key=lambda seat: len(seat.residents))
        return first

    def aged(self, progress: Progress, now: float) -> bool:
        return now - progress.request.arrived_at > self.age

    @property
    def open(self) -> list[Seat]:
        """The instances that take promises."""
        return [seat for seat in self.seats.values() if seat is not self.kept]

    def place_promised(self, now: float, everywhere: bool) -> None:
        """Newcomers are tested on every instance, those who failed once on the instances between two steps."""
        if not self.queue:
            return
        idle = [seat for seat in self.open if seat.flying is None]
        tested: dict[int, list[Tenant]] = {}
        looks = 0
        for progress in self.queue.by_turn(self.turns, self.beliefs.unloaded):
            if progress.tested and not everywhere and (looks >= LOOKS or not idle):
                continue
            looks += progress.tested
            seats = idle if progress.tested and not everywhere else self.open
            progress.tested = True
            seat = self.seat_with_slack(progress, seats, tested, now)
            if seat is None:
                seat = self.seat_for_hopeless(progress, now)
            if seat is not None and self.make_room(seat, progress, now):
                self.queue.remove(progress)
                self.seat(progress, seat)
                tested.pop(seat.instance.id, None)

    def enter(self, progress: Progress) -> None:
        """Wait in the order of service, or of arrival and priority without a promise."""
        (self.queue if progress.promised else self.waiting).add(progress)

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
        return min(seats, key=lambda seat: len(seat.promised), default=None)

    def tries(self, progress: Progress, now: float) -> bool:
        """Whether a request that seems hopeless is worth a try: an instance has stood idle for long, and what is
        believed of it may be out of date, as nothing is learned from those who are turned away.
        """
        stale = any(not seat.residents and now > seat.launched_at + STALE for seat in self.open)
        return stale and progress.left(now) * FARTHEST > self.beliefs.unloaded(progress)

    def place_rest(self, rows: Iterable[Progress]) -> None:
        """In order, until one finds no room.

        Who is too large for all instances, as workers came back with less memory, holds nobody up.
        """
        for progress in rows if self.seats else ():
            if seat := self.seat_for(progress) or self.seat_of_another(progress):
                (self.queue if progress.promised else self.waiting).remove(progress)
                self.seat(progress, seat)
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
            while victim := self.surplus(seat):
                self.evict(victim, seat)
                kv_start = seat.pages.take(progress.request.canvas_tokens)
                if kv_start is not None:
                    progress.kv_start = kv_start
                    return seat
        return None

    def surplus(self, seat: Seat) -> Progress | None:
        """The row that came last, of the tenant with most rows, if that has several."""
        held = self.held
        rows = [
            row
            for row in seat.residents.values()
            if row.state is State.RESIDENT
            and held[row.request.slo.tenant] > 1
            and not (row.promised and self.promises.admits)
        ]
        return max(rows, key=lambda row: (held[row.request.slo.tenant], ARRIVAL(row)), default=None)

    def evict(self, progress: Progress, seat: Seat) -> None:
        """The row waits again; its next step refreshes."""
        self.unseat(progress, seat)
        progress.did(Did.EVICTED)
        self.enter(progress)

    def gives_way(self, tenant: str) -> Progress | None:
        """The waiting request that makes room in a full queue for one of this tenant: the last to come that has not
        started, of the tenant that holds most places.
        """
        fresh: dict[str, list[Progress]] = {}
        if not {*self.queue.lines, *self.waiting.lines} - {tenant}:
            return None  # it would be one of its own
        for progress in chain(self.queue, self.waiting):
            if progress.started_at is None:
                fresh.setdefault(progress.request.slo.tenant, []).append(progress)
        waiting = {name: len(rows) for name, rows in fresh.items()}
        held = Counter(self.queue.counts()) + Counter(self.waiting.counts()) + self.held
        loser = gives_way(waiting, held, tenant)
        return None if loser is None else max(fresh[loser], key=ARRIVAL)

    def ever_fits(self, progress: Progress) -> bool:
        """Whether an instance holds the canvas when nobody else is there."""
        return any(seat.pages.ever_fits(progress.request.canvas_tokens) for seat in self.seats.values())

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

    def seat_with_slack(
        self, progress: Progress, seats: Sequence[Seat], tenants: dict[int, list[Tenant]], now: float
    ) -> Seat | None:
        """The instance that keeps the most slack, at the highest threshold at which any passes the test.

        `tenants` keeps the rows of the instances that were looked at.
        """
        loads = {degree: self.beliefs.loads(progress, degree) for degree in self.promises.degrees}
        looked = [seat for seat in seats if len(seat.promised) < self.max_promised]
        if not looked:
            return None
        degrees = {seat.degree for seat in looked}
        paces = {degree: self.beliefs.pace(degree).fixed for degree in degrees}
        for seat in looked:
            if seat.instance.id not in tenants:
                tenants[seat.instance.id] = self.tenants(seat, now)
        deepest = self.promises.deepest(progress)
        for level in range(min(self.promises.floor, deepest), deepest + 1):
            newcomers = {degree: tenant(progress, loads[degree][level], now) for degree in degrees}
            found: list[tuple[float, int]] = []
            for seat in looked:
                slack = fits(newcomers[seat.degree], tenants[seat.instance.id], paces[seat.degree])
                if slack is not None:
                    found.append((slack, -seat.instance.id))
            if found:
                return self.seats[-max(found)[1]]
        return None

    def tenants(self, seat: Seat, now: float) -> list[Tenant]:
        loads = self.beliefs.loads
        return [tenant(row, loads(row, seat.degree)[row.level], now) for row in seat.promised]

    def make_room(self, seat: Seat, progress: Progress, now: float) -> bool:
        """Take pages and a row, if need be from best-effort rows, the last to come first; their next step refreshes.

        The first to come stays if it has aged.
        """
        while True:
            if len(seat.residents) < self.max_rows * seat.degree:
                kv_start = seat.pages.take(progress.request.canvas_tokens)
                if kv_start is not None:
                    progress.kv_start = kv_start
                    return True
            idle = [row for row in seat.residents.values() if row.state is State.RESIDENT and not row.promised]
            last = max(idle, key=ARRIVAL, default=None)
            if last is None or (self.aged(last, now) and last is self.first(seat)):
                return False
            self.evict(last, seat)

    def first(self, seat: Seat) -> Progress:
        """The best-effort row of an instance that came first."""
        return min([row for row in seat.residents.values() if not row.promised], key=ARRIVAL)

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
        progress.promised, progress.late = False, True
        if progress.seat is None:
            self.enter(progress)


def turn(progress: Progress) -> float:
    """The order of a tenant's rows without a promised deadline."""
    request = progress.request
    return without_deadline(request.arrived_at, request.slo.weight)


def tenant(progress: Progress, need: Load, now: float) -> Tenant:
    return Tenant(progress.left(now), need.steps, need.work, progress.request.slo.weight)
