"""When a refused request may try again: as places become free, one request a place."""

from heapq import heappop, heappush

from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.request_state import Phase
from dilaserve.scheduler.rules.admission import place_in
from dilaserve.scheduler.rules.demand import ends

FRESH = 0.25  # seconds for which the expected ends of running rows are not worked out anew


class RetryTimes:
    """Gives each refused request another time, so that not all of them come back at once."""

    def __init__(self, placement: Placement, estimates: Estimates) -> None:
        self.placement, self.estimates = placement, estimates
        self.returning: list[float] = []  # when those that were refused may try again, a heap
        self.expected_ends: list[float] = []  # of running rows, in seconds from `known_at`
        self.known_at = -float("inf")

    def place_in(self, now: float) -> float:
        """Seconds after which a place will probably be free for one more request."""
        while self.returning and self.returning[0] <= now:
            heappop(self.returning)
        if not self.known_at <= now < self.known_at + FRESH:
            self.known_at, self.expected_ends = now, self.running_ends()
        seconds = place_in(self.expected_ends, len(self.returning) + 1)
        heappush(self.returning, now + seconds)
        return seconds

    def running_ends(self) -> list[float]:
        """Seconds until each of the rows on instances is done, by the estimates."""
        found: list[float] = []
        for replica in self.placement.all_replicas():
            rows = [row for row in replica.residents.values() if row.phase is not Phase.LEAVING]
            loads = [self.estimates.loads(row, replica.degree)[row.level] for row in rows]
            found += ends(loads, self.estimates.pace(replica.degree).fixed)
        return found
