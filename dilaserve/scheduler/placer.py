"""Chooses an instance for each waiting request: where its deadline is kept, or where there is room."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import ARRIVAL, Placement, arrival_turn
from dilaserve.scheduler.request_state import Phase, RequestState
from dilaserve.scheduler.rules.admission import Room, Tenant, fits, least_loaded
from dilaserve.scheduler.rules.fairness import in_turn
from dilaserve.scheduler.rules.ordering import ORDERS
from dilaserve.types import Load

LOOKS = 8  # requests at the head of the queue that each decision tests on the instances between two steps
TESTS = 300  # arrival tests of one request on one instance that a decision makes at most; about 2 µs each
PLACED = 32  # requests without admitted deadlines that a decision gives rows to, at most; about 20 µs each
WINDOW = 64  # requests that failed the test and that a tick tests again, at most
STALE = 10.0  # seconds without a step after which what is believed of an instance may be wrong
FARTHEST = 10.0  # times too long that a step may seem to take


class Placer:
    """Places waiting requests.

    A request with a deadline goes to an instance that can keep it, a best-effort request to any instance with room.
    """

    def __init__(self, placement: Placement, max_guaranteed: int) -> None:
        self.placement, self.deadlines, self.estimates = placement, placement.deadlines, placement.estimates
        self.max_guaranteed = max_guaranteed
        self.places_more = False  # there was more to place than one decision does
        # reserved for a starved request; admits no requests with deadlines meanwhile
        self.reserved_instance: InstanceState | None = None

    def place(self, now: float, everywhere: bool) -> None:
        """Place waiting requests: those with deadlines where these can be kept, then the others where there is room."""
        first = self.place_aged(now)
        if self.deadlines.admits:
            self.place_with_deadline(now, everywhere)
            self.place_rest(self.placement.waiting.by_turn(self.placement.turns, self.estimates.unloaded))
        else:
            self.place_rest(self.unadmitted(first))

    def unadmitted(self, first: RequestState | None) -> Iterator[RequestState]:
        """All that wait, with and without deadlines, in the order in which they get rows; `first` goes before all."""
        names = dict.fromkeys([*self.placement.queue.lines, *self.placement.waiting.lines])
        lines = {name: self.line_of(name) for name in names}
        rest = in_turn(lines, self.placement.turns, self.estimates.unloaded)
        return chain([first] if first else [], (state for state in rest if state is not first))

    def line_of(self, tenant: str) -> Iterator[RequestState]:
        """A tenant's requests in the order of service where deadlines are not tested; those that missed theirs last."""
        timed = [state for _, state in self.placement.queue.lines.get(tenant, ())]
        others = [state for _, state in self.placement.waiting.lines.get(tenant, ())]
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
        if not self.placement.waiting or now - self.placement.waiting.since <= self.placement.age:
            return None
        rows = self.placement.waiting.by_turn(self.placement.turns, self.estimates.unloaded)
        first = next((row for row in rows if self.placement.aged(row, now) and self.placement.ever_fits(row)), None)
        if first is None:
            return None
        if replica := self.replica_for(first):
            self.placement.waiting.remove(first)
            self.placement.assign(first, replica)
            return None
        replicas = [
            replica
            for replica in self.placement.replicas.values()
            if self.placement.holds(replica, first) and not self.has_aged(replica, now)
        ]
        self.reserved_instance = min(replicas, key=lambda replica: len(replica.residents), default=None)
        return first

    def has_aged(self, replica: InstanceState, now: float) -> bool:
        """Whether a best-effort row of the instance has waited for too long: one at a time may keep deadlines out."""
        return any(self.placement.aged(row, now) for row in replica.residents.values() if not row.has_deadline)

    @property
    def open(self) -> list[InstanceState]:
        """The instances that admit requests with deadlines."""
        return [replica for replica in self.placement.replicas.values() if replica is not self.reserved_instance]

    def place_with_deadline(self, now: float, everywhere: bool) -> None:
        """Test those that wait with a deadline, as many as a decision may.

        Newcomers are tested on every instance; those at the head of the queue on the instances between two steps; at a
        tick (`everywhere`) those whose last test is longest ago on every instance again.
        """
        queue = self.placement.queue
        if not queue:
            return
        idle = [replica for replica in self.open if replica.in_flight is None]
        head = list(islice(queue.by_turn(self.placement.turns, self.estimates.unloaded), LOOKS)) if idle else []
        looked = self.affordable([*queue.next_untested(WINDOW), *(queue.next_tested(WINDOW) if everywhere else ())])
        tenants: dict[int, list[Tenant]] = {}
        for state in queue.in_order([*head, *looked.values()], self.placement.turns, self.estimates.unloaded):
            replicas = self.open if state.request.row in looked else idle
            if not self.place_one(state, replicas, tenants, now) and state.request.row in looked:
                queue.failed(state)

    def affordable(self, some: Sequence[RequestState]) -> dict[int, RequestState]:
        """The first of these, by row, as many as a decision may test on all instances; one at least."""
        found: dict[int, RequestState] = {}
        tests = 0
        for state in some:
            if tests >= TESTS:
                break
            tests += len(self.placement.replicas) * len(state.thresholds)
            found[state.request.row] = state
        return found

    def place_one(
        self, state: RequestState, replicas: Sequence[InstanceState], tenants: dict[int, list[Tenant]], now: float
    ) -> bool:
        """Give the request a row on the best of these instances that keep its deadline and have room, if one does."""
        found = self.replicas_with_slack(state, replicas, tenants, now)
        replica = next((replica for replica in found if self.placement.make_room(replica, state, now)), None)
        if replica is None:
            replica = self.replica_for_hopeless(state, now)
            if replica is None or not self.placement.make_room(replica, state, now):
                return False
        self.placement.queue.remove(state)
        self.placement.assign(state, replica)
        tenants.pop(replica.instance.id, None)
        return True

    def any_with_slack(self, state: RequestState, now: float) -> bool:
        """Whether an instance would keep the deadline, with its room made free if need be."""
        return any(True for _ in self.replicas_with_slack(state, self.open, {}, now))

    def replica_for_hopeless(self, state: RequestState, now: float) -> InstanceState | None:
        """An instance without deadlines on which to try a request that seems hopeless, as estimates may be wrong.

        None for a request that is not hopeless: it waits for an instance that can keep its deadline.
        """
        replicas = self.open
        if self.deadlines.shed and (
            all(replica.with_deadline for replica in replicas) or self.deadlines.is_past(state, now)
        ):
            return None
        if not self.deadlines.is_hopeless(state, now):
            return None
        return min(
            [replica for replica in replicas if self.placement.holds(replica, state)],
            key=lambda replica: len(replica.with_deadline),
            default=None,
        )

    def tries(self, state: RequestState, now: float) -> bool:
        """Whether a request that seems hopeless is worth a try: an instance has stood idle for long, and what is
        believed of it may be out of date, as nothing is learned from requests that are declined.
        """
        stale = any(not replica.residents and now > replica.launched_at + STALE for replica in self.open)
        return stale and state.left(now) * FARTHEST > self.estimates.unloaded(state)

    def place_rest(self, rows: Iterable[RequestState]) -> None:
        """In order, until one finds no room, or as many have found some as a decision may place.

        A request that no instance can hold any more (workers came back with less memory) does not block the others.
        """
        placed, self.places_more = 0, False
        for state in rows if self.placement.replicas else ():
            if placed == PLACED:
                self.places_more = True
                break
            if replica := self.replica_for(state) or self.replica_of_another(state):
                (self.placement.queue if state.has_deadline else self.placement.waiting).remove(state)
                self.placement.assign(state, replica)
                placed += 1
            elif self.placement.ever_fits(state):
                break

    def replica_of_another(self, state: RequestState) -> InstanceState | None:
        """A tenant without any row gets that of a tenant with several, between two steps; it waits no longer than one.

        The evicted row, the last to come, keeps its tokens and waits again.
        """
        tenant = state.request.slo.tenant
        if self.placement.held[tenant] or max(self.placement.held.values(), default=0) < 2:
            return None
        for replica in self.placement.replicas.values():
            starts = [row.kv_start for row in self.surplus_rows(replica)]
            if not replica.pages.fits_without(state.request.canvas_tokens, starts):
                continue
            while victim := self.surplus(replica):
                self.placement.evict(victim, replica)
                kv_start = replica.pages.take(state.request.canvas_tokens)
                if kv_start is not None:
                    state.kv_start = kv_start
                    return replica
        return None

    def surplus(self, replica: InstanceState) -> RequestState | None:
        """The row that came last, of the tenant with most rows, if that has several."""
        rows = self.surplus_rows(replica)
        return max(rows, key=lambda row: (self.placement.held[row.request.slo.tenant], ARRIVAL(row)), default=None)

    def surplus_rows(self, replica: InstanceState) -> list[RequestState]:
        """Rows of tenants that have several, which may be evicted."""
        return [
            row
            for row in replica.residents.values()
            if row.phase is Phase.RESIDENT
            and self.placement.held[row.request.slo.tenant] > 1
            and not (row.has_deadline and self.deadlines.admits)
        ]

    def replica_for(self, state: RequestState) -> InstanceState | None:
        """The emptiest instance with room for the canvas, whose pages are taken; a fast one may be fuller."""
        degrees = self.deadlines.degrees
        seconds = {degree: self.estimates.unloaded(state, degree) for degree in degrees} if len(degrees) > 1 else {}
        rooms = [
            Room(id, len(replica.residents), self.placement.max_rows * replica.degree, seconds.get(replica.degree, 1.0))
            for id, replica in self.placement.replicas.items()
        ]
        for id in least_loaded(rooms):
            kv_start = self.placement.replicas[id].pages.take(state.request.canvas_tokens)
            if kv_start is not None:
                state.kv_start = kv_start
                return self.placement.replicas[id]
        return None

    def replicas_with_slack(
        self, state: RequestState, replicas: Sequence[InstanceState], tenants: dict[int, list[Tenant]], now: float
    ) -> Iterator[InstanceState]:
        """The instances that pass the test and can hold the canvas, at the highest threshold first, most slack first.

        `tenants` keeps the rows of the instances that were looked at.
        """
        looked = [
            replica
            for replica in replicas
            if len(replica.with_deadline) < self.max_guaranteed and self.placement.holds(replica, state)
        ]
        if not looked:
            return
        loads = {degree: self.estimates.loads(state, degree) for degree in {replica.degree for replica in looked}}
        paces = {degree: self.estimates.pace(degree).fixed for degree in loads}
        for replica in looked:
            if replica.instance.id not in tenants:
                tenants[replica.instance.id] = self.tenants(replica, now)
        deepest = self.deadlines.ledger.deepest(state)
        for level in range(min(self.deadlines.floor, deepest), deepest + 1):
            found: list[tuple[float, int]] = []
            for replica in looked:
                newcomer = tenant(state, loads[replica.degree][level], max(now, replica.ends_at))
                slack = fits(newcomer, tenants[replica.instance.id], paces[replica.degree])
                if slack is not None:
                    found.append((slack, -replica.instance.id))
            for _, id in sorted(found, reverse=True):
                yield self.placement.replicas[-id]

    def tenants(self, replica: InstanceState, now: float) -> list[Tenant]:
        """The rows with deadlines, as they are when the step in flight ends."""
        loads, at = self.estimates.loads, max(now, replica.ends_at)
        return [
            tenant(row, self.need_after_step(row, loads(row, replica.degree)[row.level]), at)
            for row in replica.with_deadline
        ]

    def need_after_step(self, row: RequestState, need: Load) -> Load:
        """What the row needs beside the step in flight, if it is in it."""
        if row.phase is not Phase.STEPPING or row.replica is None:
            return need
        added = row.replica.added.get(row.request.row, 0.0)
        return Load(max(0.0, need.steps - 1.0), max(0.0, need.work - added))


def tenant(state: RequestState, need: Load, now: float) -> Tenant:
    return Tenant(state.left(now), need.steps, need.work, state.request.slo.weight)
