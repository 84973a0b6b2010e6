"""The check of deadlines: which instances would keep a request's deadline, and the deadlines of all rows on them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.request_state import RequestState, Status
from dilaserve.scheduler.rules.admission import DeadlineRow, fits
from dilaserve.types import Load

STALE = 10.0  # seconds without a step after which what is expected of an instance may be out of date
FARTHEST = 10.0  # factor on the time left that a request may seem to need and still be tried on such an instance
RowsByInstance: TypeAlias = dict[int, list[DeadlineRow]]


class Passed(NamedTuple):
    """An instance that keeps a newcomer's deadline, and what the newcomer needs there at its threshold."""

    replica: InstanceState
    level: int
    need: Load


class DeadlineCheck:
    """`max_guaranteed`: rows with deadlines that one instance may have at most."""

    def __init__(self, deadlines: Deadlines, max_guaranteed: int) -> None:
        self.deadlines, self.estimates, self.max_guaranteed = deadlines, deadlines.estimates, max_guaranteed

    def passes(self, state: RequestState, replicas: Sequence[InstanceState], now: float) -> bool:
        """Whether an instance would keep the deadline, with its room made free if need be."""
        return any(True for _ in self.passed_by(state, replicas, {}, now))

    def passed_by(
        self,
        state: RequestState,
        replicas: Sequence[InstanceState],
        rows_of: RowsByInstance,
        now: float,
    ) -> Iterator[InstanceState]:
        """The instances that pass the check and can hold the canvas: highest threshold first, then most slack.

        `rows_of` caches the rows with deadlines by instance; the caller drops an entry when these rows change.
        """
        return (passed.replica for passed in self.passed(state, replicas, rows_of, now))

    def passed(
        self, state: RequestState, replicas: Sequence[InstanceState], rows_of: RowsByInstance, now: float
    ) -> Iterator[Passed]:
        """The same, with the threshold of each."""
        looked = [
            replica
            for replica in replicas
            if len(replica.with_deadline) < self.max_guaranteed and holds(replica, state)
        ]
        if not looked:
            return
        known = {replica.instance.id: replica for replica in looked}
        loads = {degree: self.estimates.loads(state, degree) for degree in {replica.degree for replica in looked}}
        paces = {degree: self.estimates.pace(degree).fixed for degree in loads}
        for replica in looked:
            if replica.instance.id not in rows_of:
                rows_of[replica.instance.id] = self.deadline_rows(replica, now)
        deepest = self.deadlines.ledger.deepest(state)
        for level in range(min(self.deadlines.floor, deepest), deepest + 1):
            found: list[tuple[float, int]] = []
            for replica in looked:
                newcomer = deadline_row(state, loads[replica.degree][level], max(now, replica.ends_at))
                slack = fits(newcomer, rows_of[replica.instance.id], paces[replica.degree])
                if slack is not None:
                    found.append((slack, -replica.instance.id))
            for _, id in sorted(found, reverse=True):
                yield Passed(known[-id], level, loads[known[-id].degree][level])

    def deadline_rows(self, replica: InstanceState, now: float) -> list[DeadlineRow]:
        """The rows with deadlines, as they are when the step in flight ends."""
        loads, at = self.estimates.loads, max(now, replica.ends_at)
        return [
            deadline_row(row, self.need_after_step(row, loads(row, replica.degree)[row.level]), at)
            for row in replica.with_deadline
        ]

    def need_after_step(self, row: RequestState, need: Load) -> Load:
        """What the row needs beside the step in flight, if it is in it."""
        if row.status is not Status.STEPPING or row.replica is None:
            return need
        added = row.replica.added.get(row.request.row, 0.0)
        return Load(max(0.0, need.steps - 1.0), max(0.0, need.work - added))

    def replica_for_hopeless(
        self, state: RequestState, replicas: Sequence[InstanceState], now: float
    ) -> InstanceState | None:
        """An instance without deadlines on which to try a request that seems hopeless, as estimates may be wrong.

        None for a request that is not hopeless: it waits for an instance that can keep its deadline.
        """
        if self.deadlines.shed and (
            all(replica.with_deadline for replica in replicas) or self.deadlines.is_past(state, now)
        ):
            return None
        if not self.deadlines.is_hopeless(state, now):
            return None
        return min(
            [replica for replica in replicas if holds(replica, state)],
            key=lambda replica: len(replica.with_deadline),
            default=None,
        )

    def is_worth_a_try(self, state: RequestState, replicas: Sequence[InstanceState], now: float) -> bool:
        """Whether a request that seems hopeless is tried all the same, because an instance has been idle for long.

        Nothing is learned from requests that are declined, so what is expected of that instance may be out of date.
        """
        stale = any(not replica.residents and now > replica.launched_at + STALE for replica in replicas)
        return stale and state.left(now) * FARTHEST > self.estimates.unloaded(state)


def holds(replica: InstanceState, state: RequestState) -> bool:
    """Whether the instance has enough K/V pages for the canvas if no other row is on it."""
    return replica.pages.ever_fits(state.request.canvas_tokens)


def deadline_row(state: RequestState, need: Load, now: float) -> DeadlineRow:
    return DeadlineRow(state.left(now), need.steps, need.work, state.request.slo.weight)
