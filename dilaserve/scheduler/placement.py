"""Where every request is: the queues, the instances, and which rows each holds."""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

from dilaserve.config import Config
from dilaserve.scheduler.backlog import Backlog
from dilaserve.scheduler.deadline_queue import DeadlineQueue
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.request_state import Phase, RequestState, Transition
from dilaserve.scheduler.rules.fairness import Turns, gives_way, granted
from dilaserve.scheduler.rules.ordering import without_deadline
from dilaserve.scheduler.waiting_queue import WaitingQueue
from dilaserve.types import Instance

ARRIVAL = attrgetter("request.arrived_at")


class Placement:
    """Assigns requests to instances and takes them off; which instance a request gets, `Placer` decides."""

    def __init__(self, config: Config, deadlines: Deadlines) -> None:
        self.deadlines, self.estimates = deadlines, deadlines.estimates
        self.max_rows = config.device.max_num_seqs
        self.age = config.scheduler.best_effort_age
        self.waiting = WaitingQueue(turn)  # best-effort requests
        self.queue = DeadlineQueue(deadlines.rank)  # requests with deadlines
        self.hopeless = Expiry()  # requests of the queue, by when they can no longer end in time
        self.backlog = Backlog()
        self.turns = Turns()  # of tenants
        self.held: Counter[str] = Counter()  # rows on instances, by tenant
        self.moving: list[RequestState] = []  # rows of an old plan that wait for the new one to stand
        self.replicas: dict[int, InstanceState] = {}
        self.closing: dict[int, InstanceState] = {}  # instances of an old plan that finish their step in flight

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
            row.phase is not Phase.LEAVING for replica in self.all_replicas() for row in replica.residents.values()
        )

    def aged(self, state: RequestState, now: float) -> bool:
        return now - state.request.arrived_at > self.age

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
        """Whether an instance holds the canvas when nobody else is there."""
        return any(self.holds(replica, state) for replica in self.replicas.values())

    def holds(self, replica: InstanceState, state: RequestState) -> bool:
        """Whether the instance has K/V for the canvas when nobody else is there."""
        return replica.pages.ever_fits(state.request.canvas_tokens)

    def make_room(self, replica: InstanceState, state: RequestState, now: float) -> bool:
        """Take pages and a row, if need be from best-effort rows, the last to come first; their next step refreshes.

        Nobody is evicted if that is not enough.
        """
        canvas = state.request.canvas_tokens
        rows = self.evictable(replica, now)
        starts = [row.kv_start for row in rows]
        over = max(0, len(replica.residents) + 1 - self.max_rows * replica.degree)  # rows that must go in any case
        if over > len(rows) or not replica.pages.fits_without(canvas, starts):
            return False
        enough = bisect_left(
            range(over, len(rows)), True, key=lambda count: replica.pages.fits_without(canvas, starts[:count])
        )
        for row in rows[: over + enough]:
            self.evict(row, replica)
        kv_start = replica.pages.take(canvas)
        assert kv_start is not None, "pages that were counted as free are not"
        state.kv_start = kv_start
        return True

    def evictable(self, replica: InstanceState, now: float) -> list[RequestState]:
        """Best-effort rows between two steps, the last to come first; the first of all stays if it has aged."""
        rest = sorted([row for row in replica.residents.values() if not row.has_deadline], key=ARRIVAL, reverse=True)
        if rest and self.aged(rest[-1], now):
            rest.pop()
        return [row for row in rest if row.phase is Phase.RESIDENT]

    def assign(self, state: RequestState, replica: InstanceState) -> None:
        tenant = state.request.slo.tenant
        if not state.charged:
            state.charged = True
            self.turns = granted(self.turns, tenant, self.estimates.unloaded(state))
        self.held[tenant] += 1
        state.did(Transition.PLACED)
        state.replica = replica
        replica.residents[state.request.row] = state
        if state.has_deadline:
            insort(replica.with_deadline, state, key=self.deadlines.rank)

    def unassign(self, state: RequestState, replica: InstanceState) -> None:
        del replica.residents[state.request.row]
        tenant = state.request.slo.tenant
        self.held[tenant] -= 1
        if not self.held[tenant]:
            del self.held[tenant]
        if state in replica.with_deadline:
            replica.with_deadline.remove(state)
        replica.pages.give(state.kv_start)
        state.replica, state.fresh, state.loads, state.ready = None, False, None, None

    def doom(self, rank: int) -> None:
        """The worker is gone: nothing more is launched on its instance, which is lost once its peers have left it."""
        for replica in self.all_replicas():
            replica.doomed |= rank in replica.instance.ranks

    def move_to(self, instance: Instance, forming: Iterable[Instance]) -> None:
        """Rows of an old plan go on: an instance that stands takes its part, by devices, of what fits on it, and leaves
        the others to those that are still to stand.
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
