"""Requests that wait for a row: by tenant, each tenant's in its own order."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import chain

from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.fairness import Turns, in_turn

Spot = tuple[float, float, int]  # key, arrival, row
SLACK = 64  # entries of requests that left below which the heap is not rebuilt


class WaitingQueue:
    """`key` gives the order within a tenant; it is computed when a request enters and kept until it leaves.

    Plain lists, as every decision copies them: 1,000 entries in 4 µs, where those of sortedcontainers take 21 µs, and
    save one of the 4 µs in which a request enters and leaves.
    """

    def __init__(self, key: Callable[[RequestState], float]) -> None:
        self.key = key
        self.lines: dict[str, list[tuple[Spot, RequestState]]] = {}
        self.spots: dict[int, Spot] = {}  # by row
        self.members: dict[int, RequestState] = {}  # by row
        self.arrivals: list[tuple[float, int]] = []  # a heap; entries of requests that left are dropped at the front

    def add(self, state: RequestState) -> None:
        request = state.request
        self.members[request.row] = state
        spot = self.spots[request.row] = (self.key(state), request.arrived_at, request.row)
        if len(self.arrivals) > SLACK + 2 * len(self.spots):
            self.arrivals = [(arrived_at, row) for row, (_, arrived_at, _) in self.spots.items()]
            heapq.heapify(self.arrivals)
        else:
            heapq.heappush(self.arrivals, (request.arrived_at, request.row))
        insort(self.lines.setdefault(request.slo.tenant, []), (spot, state), key=lambda entry: entry[0])

    def remove(self, state: RequestState) -> None:
        tenant = state.request.slo.tenant
        line = self.lines[tenant]
        del self.members[state.request.row]
        del line[bisect_left(line, self.spots.pop(state.request.row), key=lambda entry: entry[0])]
        if not line:
            del self.lines[tenant]

    def __len__(self) -> int:
        return len(self.spots)

    def __contains__(self, state: RequestState) -> bool:
        return self.members.get(state.request.row) is state

    def __iter__(self) -> Iterator[RequestState]:
        """All requests in order, across tenants. Requests may leave during the iteration."""
        lines = [list(line) for line in self.lines.values()]
        merged = chain(*lines) if len(lines) == 1 else heapq.merge(*lines, key=lambda entry: entry[0])
        return (state for _, state in merged)

    @property
    def since(self) -> float:
        """When the first came, of a line that is not empty."""
        while True:
            arrived_at, row = self.arrivals[0]
            if row in self.spots and self.spots[row][1] == arrived_at:
                return arrived_at
            heapq.heappop(self.arrivals)

    def counts(self) -> dict[str, int]:
        return {tenant: len(line) for tenant, line in self.lines.items()}

    def by_turn(self, turns: Turns, seconds: Callable[[RequestState], float]) -> Iterator[RequestState]:
        """All requests in the order in which tenants get rows. Requests may leave during the iteration."""
        lines = {tenant: list(line) for tenant, line in self.lines.items()}
        return (state for _, state in in_turn(lines, turns, lambda entry: seconds(entry[1])))
