"""Places waiting requests on instances, and takes them off: the queues, the instances, and which rows each holds."""

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter

from dilaserve.config import Config
from dilaserve.scheduler import kv_memory
from dilaserve.scheduler.backlog import Backlog
from dilaserve.scheduler.deadline_check import DeadlineCheck, RowsByInstance, holds
from dilaserve.scheduler.deadline_queue import DeadlineQueue
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.request_state import RequestState, Status, Transition
from dilaserve.scheduler.rules.admission import Room, least_loaded
from dilaserve.scheduler.rules.fairness import Turns, gives_way, granted, in_turn
from dilaserve.scheduler.rules.ordering import ORDERS, without_deadline
from dilaserve.scheduler.waiting_queue import WaitingQueue
from dilaserve.types import Instance

LOOKS = 8  # requests at the head of the queue that each decision checks on instances between two steps
TESTS = 300  # checks of one request on one instance that a decision makes at most; about 2 µs each
PLACED = 32  # requests without admitted deadlines that a decision gives rows to, at most; about 20 µs each
WINDOW = 64  # requests that failed the check and that a tick checks again, at most
ARRIVAL = attrgetter("request.arrived_at")


class Placement:
    """Assigns waiting requests to instances and evicts rows.

    A request with a deadline goes to an instance that can keep it, a best-effort request to any instance with room.
    """

    def __init__(self, config: Config, deadlines: Deadlines) -> None:
        self.deadlines, self.estimates = deadlines, deadlines.estimates
        self.max_rows = config.device.max_num_seqs
        self.check = DeadlineCheck(deadlines, config.scheduler.guaranteed_rows)
        self.age = config.scheduler.best_effort_age
        self.waiting = WaitingQueue(turn)  # best-effort requests
        self.queue = DeadlineQueue(deadlines.rank)  # requests with deadlines
        self.hopeless = Expiry()  # requests of the queue, by when they can no longer end in time
        self.backlog = Backlog()
        self.turns = Turns()  # of tenants
        self.held: Counter[str] = Counter()  # rows on instances, by tenant
        self.moving: list[RequestState] = []  # rows of an old plan that wait for the instances of the new one
        self.replicas: dict[int, InstanceState] = {}
        self.closing: dict[int, InstanceState] = {}  # instances of an old plan that finish their step in flight
        self.unplaced: list[RequestState] = []  # that have failed their first test
        self.places_more = False  # there was more to place than one decision does
        # reserved for a starved request; admits no requests with deadlines meanwhile
        self.reserved_instance: InstanceState | None = None

    def instances_changed(self) -> None:
        self.deadlines.degrees = tuple(sorted({replica.degree for replica in self.replicas.values()})) or (
            self.estimates.base,
        )

    def all_replicas(self) -> Iterator[InstanceState]:
        """The instances of the plan, and those of an old one that finish their step in flight."""
        return chain(self.replicas.values(), self.closing.values())

    def instances(self) -> list[Instance]:
        return [replica.instance for replica in self.all_replicas()]

    @property
    def running(self) -> int:
        """Requests that have a row on an instance and have not ended."""
        return sum(
            row.status is not Status.LEAVING for replica in self.all_replicas() for row in replica.residents.values()
        )

    def place(self, now: float, everywhere: bool) -> None:
        """Place waiting requests: those with deadlines where these can be kept, then the others where there is room."""
        first = self.place_aged(now)
        if self.deadlines.admits:
            self.place_with_deadline(now, everywhere)
            self.place_rest(self.waiting.by_turn(self.turns, self.estimates.unloaded))
        else:
            self.place_rest(self.unadmitted(first))

    def unadmitted(self, first: RequestState | None) -> Iterator[RequestState]:
        """All that wait, with and without deadlines, in the order in which they get rows; `first` goes before all."""
        names = dict.fromkeys([*self.queue.lines, *self.waiting.lines])
        lines = {name: self.line_of(name) for name in names}
        rest = in_turn(lines, self.turns, self.estimates.unloaded)
        return chain([first] if first else [], (state for state in rest if state is not first))

    def line_of(self, tenant: str) -> Iterator[RequestState]:
        """A tenant's requests in the order of service where deadlines are not tested; those that missed theirs last."""
        timed = [state for _, state in self.queue.lines.get(tenant, ())]
        others = [state for _, state in self.waiting.lines.get(tenant, ())]
        timely = (state for state in others if not state.late)
        late = (state for state in others if state.late)
        if self.deadlines.order is ORDERS["fcfs"]:
            return chain(heapq.merge(timed, timely, key=arrival_turn), late)
        return chain(timed, timely, late)

    def place_aged(self, now: float) -> RequestState | None:
        """A best-effort request that has waited for too long gets a row before requests with deadlines do.

        Returns it if there was no room; an instance without such a row then takes no deadlines until there is.
        """
        self.reserved_instance = None
        if not self.waiting or now - self.waiting.since <= self.age:
            return None
        rows = self.waiting.by_turn(self.turns, self.estimates.unloaded)
        first = next((row for row in rows if self.aged(row, now) and self.ever_fits(row)), None)
        if first is None:
            return None
        if replica := self.replica_for(first):
            self.waiting.remove(first)
            self.assign(first, replica)
            return None
        replicas = [
            replica for replica in self.replicas.values() if holds(replica, first) and not self.has_aged(replica, now)
        ]
        self.reserved_instance = min(replicas, key=lambda replica: len(replica.residents), default=None)
        return first

    def has_aged(self, replica: InstanceState, now: float) -> bool:
        """Whether a best-effort row of the instance has waited for too long: one at a time may keep deadlines out."""
        return any(self.aged(row, now) for row in replica.residents.values() if not row.has_deadline)

    def aged(self, state: RequestState, now: float) -> bool:
        return now - state.request.received_at > self.age

    @property
    def open(self) -> list[InstanceState]:
        """The instances that admit requests with deadlines."""
        return [replica for replica in self.replicas.values() if replica is not self.reserved_instance]

    def place_with_deadline(self, now: float, everywhere: bool) -> None:
        """Test those that wait with a deadline, as many as a decision may.

        Newcomers are tested on every instance; those at the head of the queue on the instances between two steps; at a
        tick (`everywhere`) those whose last test is longest ago on every instance again.
        """
        queue = self.queue
        if not queue:
            return
        idle = [replica for replica in self.open if replica.in_flight is None]
        head = list(islice(queue.by_turn(self.turns, self.estimates.unloaded), LOOKS)) if idle else []
        looked = self.affordable([*queue.next_untested(WINDOW), *(queue.next_tested(WINDOW) if everywhere else ())])
        rows_of: RowsByInstance = {}
        for state in queue.in_order([*head, *looked.values()], self.turns, self.estimates.unloaded):
            row = state.request.row
            replicas = self.open if row in looked else idle
            if not self.place_one(state, replicas, rows_of, now) and row in looked and queue.failed(state):
                self.unplaced.append(state)

    def affordable(self, some: Sequence[RequestState]) -> dict[int, RequestState]:
        """The first of these, by row, as many as a decision may test on all instances; one at least."""
        found: dict[int, RequestState] = {}
        tests = 0
        for state in some:
            if tests >= TESTS:
                break
            tests += len(self.replicas) * len(state.thresholds)
            found[state.request.row] = state
        return found

    def place_one(
        self,
        state: RequestState,
        replicas: Sequence[InstanceState],
        rows_of: RowsByInstance,
        now: float,
    ) -> bool:
        """Give the request a row on the best of these instances that keep its deadline and have room, if one does."""
        found = self.check.passed_by(state, replicas, rows_of, now)
        replica = next((replica for replica in found if self.make_room(replica, state, now)), None)
        if replica is None:
            replica = self.check.replica_for_hopeless(state, self.open, now)
            if replica is None or not self.make_room(replica, state, now):
                return False
        self.queue.remove(state)
        self.assign(state, replica)
        rows_of.pop(replica.instance.id, None)
        return True

    def enter(self, state: RequestState) -> None:
        """Wait in the order of service, or of arrival and priority without a deadline."""
        if not state.has_deadline:
            self.waiting.add(state)
            return
        self.queue.add(state)
        if self.deadlines.sheds:
            self.hopeless.add(state, self.deadlines.hopeless_at(state), self.backlog.unfinished)

    def leave(self, state: RequestState) -> None:
        """Leave the queue; a row on an instance gets no more steps and stays there until its batch is done."""
        if state.replica is None:
            home = self.queue if state.has_deadline else self.waiting
            (self.moving if state in self.moving else home).remove(state)
        elif state.has_deadline:
            state.replica.with_deadline.remove(state)

    def place_rest(self, rows: Iterable[RequestState]) -> None:
        """In order, until one finds no room, or as many have found some as a decision may place.

        A request that no instance can hold any more (workers came back with less memory) does not block the others.
        """
        placed, self.places_more = 0, False
        for state in rows if self.replicas else ():
            if placed == PLACED:
                self.places_more = True
                break
            if replica := self.replica_for(state) or self.replica_of_another(state):
                (self.queue if state.has_deadline else self.waiting).remove(state)
                self.assign(state, replica)
                placed += 1
            elif self.ever_fits(state):
                break

    def replica_of_another(self, state: RequestState) -> InstanceState | None:
        """A tenant without a row takes one from a tenant with several, between two steps.

        The row evicted is the last that came; it keeps its tokens and waits again.
        """
        tenant = state.request.slo.tenant
        if self.held[tenant] or max(self.held.values(), default=0) < 2:
            return None
        for replica in self.replicas.values():
            rows = self.surplus(replica)
            if not replica.pages.fits_without(state.kv_tokens, [row.kv_start for row in rows]):
                continue
            for victim in rows:
                self.evict(victim, replica)
                if kv_memory.take(state, replica, watermark=False):
                    return replica
        return None

    def surplus(self, replica: InstanceState) -> list[RequestState]:
        """Rows that may be evicted so that each tenant keeps one: of the tenant with most rows, the last to come first.

        None has a deadline that was admitted.
        """
        lines: dict[str, list[RequestState]] = {}
        for row in replica.residents.values():
            if row.status is Status.RESIDENT and not (row.has_deadline and self.deadlines.admits):
                lines.setdefault(row.request.slo.tenant, []).append(row)
        found: list[tuple[int, RequestState]] = []  # rows of the tenant just before this one is evicted
        for tenant, rows in lines.items():
            rows.sort(key=ARRIVAL, reverse=True)
            found += zip(range(self.held[tenant], 1, -1), rows, strict=False)
        return [row for _, row in sorted(found, key=lambda one: (one[0], ARRIVAL(one[1])), reverse=True)]

    def evict(self, state: RequestState, replica: InstanceState) -> None:
        """The row waits again; its next step refreshes."""
        self.unassign(state, replica)
        state.did(Transition.EVICTED)
        self.enter(state)

    def gives_way(self, tenant: str) -> RequestState | None:
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

    def ever_fits(self, state: RequestState) -> bool:
        """Whether an instance has enough K/V pages for the canvas if no other row is on it."""
        return any(holds(replica, state) for replica in self.replicas.values())

    def replica_for(self, state: RequestState) -> InstanceState | None:
        """The emptiest instance with room, whose pages are taken; one that is fast or holds K/V of it may be fuller."""
        degrees = self.deadlines.degrees
        seconds = {degree: self.estimates.unloaded(state, degree) for degree in degrees} if len(degrees) > 1 else {}
        rooms = [
            Room(id, len(replica.residents), self.max_rows * replica.degree, seconds.get(replica.degree, 1.0))
            for id, replica in self.replicas.items()
        ]
        replicas = [self.replicas[id] for id in least_loaded(rooms)]
        for replica in kv_memory.longest_prefix_first(state, replicas):
            if kv_memory.take(state, replica):
                return replica
        return None

    def make_room(self, replica: InstanceState, state: RequestState, now: float) -> bool:
        """Take pages and a row, if need be from best-effort rows, the last to come first; their next step refreshes.

        No row is evicted if that is not enough.
        """
        tokens = state.kv_tokens
        rows = self.evictable(replica, now)
        starts = [row.kv_start for row in rows]
        over = max(0, len(replica.residents) + 1 - self.max_rows * replica.degree)  # rows that must go in any case
        if over > len(rows) or not replica.pages.fits_without(tokens, starts):
            return False
        enough = bisect_left(
            range(over, len(rows)), True, key=lambda count: replica.pages.fits_without(tokens, starts[:count])
        )
        for row in rows[: over + enough]:
            self.evict(row, replica)
        taken = kv_memory.take(state, replica, watermark=False)
        assert taken, "pages that were counted as free are not"
        return True

    def evictable(self, replica: InstanceState, now: float) -> list[RequestState]:
        """Best-effort rows between two steps, the last to come first; the first of all stays if it has aged."""
        rest = sorted([row for row in replica.residents.values() if not row.has_deadline], key=ARRIVAL, reverse=True)
        if rest and self.aged(rest[-1], now):
            rest.pop()
        return [row for row in rest if row.status is Status.RESIDENT]

    def assign(self, state: RequestState, replica: InstanceState) -> None:
        tenant = state.request.slo.tenant
        if not state.charged:
            state.charged = True
            self.turns = granted(self.turns, tenant, self.estimates.unloaded(state))
        self.held[tenant] += 1
        state.did(Transition.PLACED)
        state.replica = replica
        kv_memory.reuse_prefix(state, replica)
        replica.residents[state.request.row] = state
        if state.has_deadline:
            insort(replica.with_deadline, state, key=self.deadlines.rank)

    def grow_rows(self, replica: InstanceState) -> None:
        """Take K/V memory for next blocks, in the order of service; where there is none, the last row waits again."""
        rows = replica.residents.values()
        if not any(row.wants_more and row.part.block_end > row.room for row in rows):
            return
        order = [*replica.with_deadline, *sorted([row for row in rows if not row.has_deadline], key=turn)]
        while order:
            state = order.pop(0)
            if state.status is not Status.RESIDENT or state.part.block_end <= state.room:
                continue
            while not kv_memory.grow(state, replica):
                self.evict(victim := order.pop() if order else state, replica)
                if victim is state:
                    break

    def unassign(self, state: RequestState, replica: InstanceState) -> None:
        del replica.residents[state.request.row]
        tenant = state.request.slo.tenant
        self.held[tenant] -= 1
        if not self.held[tenant]:
            del self.held[tenant]
        if state in replica.with_deadline:
            replica.with_deadline.remove(state)
        replica.pages.give(state.kv_start)
        state.replica, state.cached, state.loads, state.ready = None, 0, None, None

    def doom(self, rank: int) -> None:
        """The worker is gone: nothing more is launched on its instance, which is lost once its peers have left it."""
        for replica in self.all_replicas():
            replica.doomed |= rank in replica.instance.ranks

    def move_to(self, instance: Instance, forming: Iterable[Instance]) -> None:
        """Let rows of an old plan wait for this new instance, which is up.

        It takes its share, by devices, of the rows that fit on it, and leaves the others to instances still to come.
        """
        pages, mine = self.replicas[instance.id].pages, len(instance.ranks)
        coming = {rank for other in (*forming, *self.closing_instances()) for rank in other.ranks}
        fitting = [row for row in self.moving if pages.ever_fits(row.request.canvas_tokens)]
        fitting.sort(key=lambda row: (row.left(0.0), ARRIVAL(row)))
        part = fitting[: math.ceil(len(fitting) * mine / (mine + len(coming)))]
        self.moving = [row for row in self.moving if row not in part]
        self.wait_again(part)

    def closing_instances(self) -> list[Instance]:
        return [replica.instance for replica in self.closing.values()]

    def wait_again(self, rows: list[RequestState]) -> None:
        """Rows that were taken off an instance go back into the queues, in the order that they had."""
        for state in rows:
            self.enter(state)

    def demote(self, state: RequestState) -> None:
        """The deadline is given up; the request goes on as best effort."""
        self.leave(state)
        self.backlog.remove(state)
        state.has_deadline, state.late = False, True
        self.backlog.add(state)
        if state.replica is None:
            self.enter(state)


def arrival_turn(state: RequestState) -> float:
    """The order of arrival, in which priority counts without a deadline."""
    return ARRIVAL(state) if state.has_deadline else turn(state)


def turn(state: RequestState) -> float:
    """The order of a tenant's best-effort requests."""
    request = state.request
    return without_deadline(request.arrived_at, request.slo.weight)
