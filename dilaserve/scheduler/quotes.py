"""What the scheduler would say of a request now, without taking it in. Nothing that it remembers changes.

The request is judged by the code that judges arrivals. What that code writes down meanwhile is put back: sums over
requests, and what was worked out of rows, which would else be older than it is when the next step is chosen.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from msgspec.structs import replace

from dilaserve.scheduler.arrival_check import ArrivalCheck
from dilaserve.scheduler.deadline_check import Passed, RowsByInstance, deadline_row
from dilaserve.scheduler.endings import Endings
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.request_state import RequestState, Status
from dilaserve.scheduler.retry_times import RetryTimes
from dilaserve.scheduler.rules.admission import finish, free_after
from dilaserve.scheduler.rules.demand import end_beside, ends
from dilaserve.types import Load, Quote, Request

SAMPLE = 16  # rows of an instance that are looked at for the time of one without a deadline; 10 µs each


class Quotes:
    """Judges requests as `Scheduler.arrival` does."""

    def __init__(self, check: ArrivalCheck, endings: Endings, retry_times: RetryTimes) -> None:
        self.check, self.endings, self.retry_times = check, endings, retry_times
        self.placement, self.deadlines, self.estimates = check.placement, check.deadlines, check.estimates

    def quote(self, request: Request, now: float, has_row: bool = True) -> Quote:
        """The answer to this request if it came now. `has_row`: the table has a free row for it; else it needs one of a
        request that gives way.
        """
        running = self.placement.running
        with unchanged(self.placement), untouched(self.rows_with_deadline()):
            state = self.deadlines.arrived(request)
            state.deadline = self.check.deadline(state)
            state.has_deadline = state.deadline is not None
            state.seconds = self.estimates.unloaded(state)
            self.placement.backlog.add(state)
            found = self.timed(state, now) if state.has_deadline else self.untimed(state, now)
            refused = not has_row and self.placement.gives_way(request.slo.tenant) is None
            if refused or (found.admitted and self.check.is_too_much(state, now)):
                found = replace(found, admitted=False, retry_after=self.retry_after(now))
        return replace(found, running=running, waiting=len(self.endings.requests) - running)

    def rows_with_deadline(self) -> list[RequestState]:
        return list(chain.from_iterable(replica.with_deadline for replica in self.placement.all_replicas()))

    def retry_after(self, now: float) -> float:
        """Of a request that would be refused."""
        with untouched(list(chain.from_iterable(one.residents.values() for one in self.placement.all_replicas()))):
            return self.retry_times.peek(now)

    def timed(self, state: RequestState, now: float) -> Quote:
        """Of a request with a deadline."""
        left, replicas, rows_of = state.left(now), self.placement.open, dict[int, Any]()
        if not self.check.tests:
            return Quote(admitted=True, deadline=left)
        if passed := next(self.placement.check.passed(state, replicas, rows_of, now), None):
            return self.kept(state, passed, rows_of, now)
        if self.placement.check.is_worth_a_try(state, replicas, now):
            return Quote(admitted=True, deadline=left)
        decline = self.endings.declined(state, now)
        return Quote(
            admitted=state.request.slo.on_miss != "reject",
            deadline=left,
            met=False,
            never_feasible=decline.never_feasible,
            retry_after=None if decline.never_feasible else decline.retry_after,
        )

    def kept(self, state: RequestState, passed: Passed, rows_of: RowsByInstance, now: float) -> Quote:
        """Of one whose deadline an instance keeps; it may step once the step in flight is done."""
        replica = passed.replica
        begins = max(now, replica.ends_at)
        newcomer, rows = deadline_row(state, passed.need, begins), rows_of[replica.instance.id]
        seconds = begins - now + finish(newcomer, rows, self.estimates.pace(replica.degree).fixed)
        return Quote(
            admitted=True,
            deadline=state.left(now),
            met=True,
            slack=state.left(now) - seconds,
            threshold=state.thresholds[passed.level] if state.by_threshold else None,
            wait=begins - now,
            finish=seconds,
        )

    def untimed(self, state: RequestState, now: float) -> Quote:
        """Of a best-effort request: it starts at once where there is room, else in the order of the line."""
        replicas = [one for one in self.placement.replicas.values() if one.pages.ever_fits(state.request.canvas_tokens)]
        if not replicas or not self.estimates.sure(self.deadlines.degrees):
            return Quote(admitted=True)
        ahead = len(self.placement.queue) + len(self.placement.waiting)
        free = [] if ahead else [replica for replica in replicas if self.has_room(replica, state)]
        replica = min(free or replicas, key=lambda one: len(one.residents))
        (needs, weight), fixed = self.needs(replica), self.estimates.pace(replica.degree).fixed
        wait = max(0.0, replica.ends_at - now)
        if not free and needs:  # all instances are expected to free rows as this one does
            wait = free_after(ends(needs, fixed), math.ceil((ahead // len(replicas) + 1) / weight))
        need = self.estimates.loads(state, replica.degree)[0]
        return Quote(admitted=True, wait=wait, finish=wait + end_beside(need, needs, fixed))

    def has_room(self, replica: InstanceState, state: RequestState) -> bool:
        rows = len(replica.residents) < self.placement.max_rows * replica.degree
        return rows and replica.pages.fits_without(state.kv_tokens, [])

    def needs(self, replica: InstanceState) -> tuple[list[Load], float]:
        """What the rows of an instance still need: some of many rows, and how many rows each stands for."""
        rows = [row for row in replica.residents.values() if row.status is not Status.LEAVING]
        some = rows[:: -(-len(rows) // SAMPLE) or 1]
        weight = len(rows) / max(1, len(some))
        with untouched(some):
            loads = [self.estimates.loads(row, replica.degree)[row.level] for row in some]
        return [Load(load.steps, weight * load.work) for load in loads], weight or 1.0


@contextlib.contextmanager
def unchanged(placement: Placement) -> Iterator[None]:
    """Put back the sums over requests, which step costs were looked at, and what the forecast has kept."""
    estimates, backlog = placement.estimates, placement.backlog
    paces, surely, sums = dict(estimates.paces), set(estimates.surely), dict(vars(backlog))
    try:
        with estimates.forecast.unkept():
            yield
    finally:
        estimates.paces, estimates.surely = paces, surely
        vars(backlog).update(sums)


@contextlib.contextmanager
def untouched(rows: Sequence[RequestState]) -> Iterator[None]:
    """Put back what is worked out of these rows."""
    known = [(row.loads, row.tracks, row.tracked) for row in rows]
    try:
        yield
    finally:
        for row, before in zip(rows, known, strict=True):
            row.loads, row.tracks, row.tracked = before
