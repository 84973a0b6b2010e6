"""Which requests are to be looked at by when, if they have not ended by then: at their deadline, for one."""

import heapq
from collections.abc import Iterator
from itertools import count

from dilaserve.scheduler.request_state import RequestState, Status

EARLY = 1e-6  # seconds by which a timer may ring before its time
SLACK = 64  # entries of ended requests below which the heap is not rebuilt
ENDED = (Status.LEAVING, Status.GONE)


class Expiry:
    """Requests by deadline, the earliest first; what has ended drops out by itself."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, RequestState]] = []
        self.numbers = count()  # two deadlines at the same instant are in order of arrival

    def add(self, state: RequestState, deadline: float, alive: int) -> None:
        """`alive` bounds the entries worth keeping: requests that have not ended."""
        if len(self.heap) > SLACK + 2 * alive:
            self.heap = [entry for entry in self.heap if entry[2].status not in ENDED]
            heapq.heapify(self.heap)
        heapq.heappush(self.heap, (deadline, next(self.numbers), state))

    def next_at(self) -> float:
        """The earliest deadline; infinite without one."""
        while self.heap and self.heap[0][2].status in ENDED:
            heapq.heappop(self.heap)
        return self.heap[0][0] if self.heap else float("inf")

    def passed(self, now: float, most: int) -> Iterator[RequestState]:
        """Take out up to so many of the requests whose time has come, each when it is asked for."""
        for _ in range(most):
            if self.next_at() > now + EARLY:
                return
            yield heapq.heappop(self.heap)[2]
