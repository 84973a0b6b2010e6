"""Looked at every quarter of a second: the floor of the thresholds, and requests that can no longer end in time."""

from collections.abc import Iterator

from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.request_state import RequestState

TICK = 0.25  # seconds between two passes over all waiting requests
MOST_HOPELESS = 32  # requests that one decision gives up; about 30 µs each
NEVER = float("inf")


class DeadlineTicks:
    """Counts ticks. `unfinished`: more requests have become hopeless than one decision looks at."""

    def __init__(self, deadlines: Deadlines, placement: Placement) -> None:
        self.deadlines, self.placement = deadlines, placement
        self.ticked_at = -NEVER
        self.unfinished = False

    def due(self, now: float) -> bool:
        """Whether all waiting requests are looked at again, every quarter of a second while there is a reason."""
        reason = self.placement.queue or self.deadlines.admits or self.deadlines.floor
        return now >= self.ticked_at + TICK and bool(reason)

    def wake_at(self) -> float:
        return self.ticked_at + TICK if self.placement.queue or self.deadlines.floor else NEVER

    def move_floor(self, now: float) -> None:
        """Move the floor of the thresholds, by what instances saw at their last step."""
        self.ticked_at = now
        if not self.deadlines.moves_floor:
            return
        queue, replicas = self.placement.queue, self.placement.replicas.values()
        missing, total, crowd = len(queue.tested), len(queue), float(len(queue))  # each is one more somewhere
        for replica in replicas:
            if replica.with_deadline:
                missing, total = missing + replica.late, total + len(replica.with_deadline)
                crowd += replica.crowding
        self.deadlines.look(missing, total, crowd / max(1, len(replicas)))

    def hopeless(self, now: float, ticks: bool, count: int) -> Iterator[RequestState]:
        """Requests that wait and can no longer end in time: at a tick, or if the last decision left some.

        As many as there are instances without deadlines are kept: they are tried there, as estimates may err. That a
        deadline has passed is no estimate, and holds while what steps cost is a guess. `count` requests are open.
        """
        if not (self.deadlines.sheds and (ticks or self.unfinished)):
            return
        spare = sum(not replica.with_deadline for replica in self.placement.replicas.values())
        times = self.placement.hopeless
        for state in times.passed(now, MOST_HOPELESS):
            if state not in self.placement.queue:
                continue
            past = self.deadlines.is_past(state, now)
            if past or (self.deadlines.shed and self.deadlines.is_hopeless(state, now)):
                spare -= 1
                if spare < 0 or past:
                    yield state
                    continue
            times.add(state, max(now + TICK, self.deadlines.hopeless_at(state)), count)
        self.unfinished = times.next_at() <= now
