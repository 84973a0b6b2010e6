"""When a refused client should try again: when rows will probably be free, a different time for each client."""

from heapq import heappop, heappush

from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.request_state import Status
from dilaserve.scheduler.rules.admission import place_in
from dilaserve.scheduler.rules.demand import ends

FRESH = 0.25  # seconds for which the expected ends of running rows are reused before they are estimated again


class RetryTimes:
    """Estimates `retry_after` so that refused clients do not all come back at once."""

    def __init__(self, placement: Placement, estimates: Estimates) -> None:
        self.placement, self.estimates = placement, estimates
        self.returning: list[float] = []  # times at which refused clients may come back, a heap
        self.ends: tuple[float, list[float]] = (float("-inf"), [])  # when estimated, and seconds until each row ends

    def next(self, now: float) -> float:
        """Seconds after which one more refused client will probably find a free row."""
        while self.returning and self.returning[0] <= now:
            heappop(self.returning)
        self.ends = self.recent_ends(now)
        seconds = place_in(self.ends[1], len(self.returning) + 1)
        heappush(self.returning, now + seconds)
        return seconds

    def peek(self, now: float) -> float:
        """What `next` would give, without a client that comes back then."""
        coming = sum(at > now for at in self.returning)
        return place_in(self.recent_ends(now)[1], coming + 1)

    def recent_ends(self, now: float) -> tuple[float, list[float]]:
        """When the ends of running rows were estimated, a short while ago at most, and these."""
        return self.ends if self.ends[0] <= now < self.ends[0] + FRESH else (now, self.running_ends())

    def running_ends(self) -> list[float]:
        """Seconds until each row on an instance is expected to be done."""
        found: list[float] = []
        for replica in self.placement.all_replicas():
            rows = [row for row in replica.residents.values() if row.status is not Status.LEAVING]
            loads = [self.estimates.loads(row, replica.degree)[row.level] for row in rows]
            found += ends(loads, self.estimates.pace(replica.degree).fixed)
        return found
