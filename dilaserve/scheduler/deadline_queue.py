"""Requests that wait for an instance that keeps their deadline, and whose turn it is to be tested again."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.fairness import Turns, in_turn
from dilaserve.scheduler.waiting_queue import WaitingQueue


class DeadlineQueue(WaitingQueue):
    """In the order of `key`; and beside it, by row, those that were never tested and those that failed the test."""

    def __init__(self, key: Callable[[RequestState], float]) -> None:
        super().__init__(key)
        self.untested: OrderedDict[int, RequestState] = OrderedDict()
        self.tested: OrderedDict[int, RequestState] = OrderedDict()  # the one with the oldest test comes first

    def add(self, state: RequestState) -> None:
        """Wait, as one that was never tested: instances may have changed since the request waited before."""
        super().add(state)
        self.untested[state.request.row] = state

    def remove(self, state: RequestState) -> None:
        super().remove(state)
        self.untested.pop(state.request.row, None)
        self.tested.pop(state.request.row, None)

    def next_untested(self, most: int) -> list[RequestState]:
        return list(islice(self.untested.values(), most))

    def next_tested(self, most: int) -> list[RequestState]:
        return list(islice(self.tested.values(), most))

    def failed(self, state: RequestState) -> bool:
        """The request was tested and waits on; all others that wait are tested on all instances before it is again.

        Returns whether that was its first test.
        """
        first = self.untested.pop(state.request.row, None) is not None
        self.tested[state.request.row] = state
        self.tested.move_to_end(state.request.row)
        return first

    def in_order(
        self, some: Iterable[RequestState], turns: Turns, seconds: Callable[[RequestState], float]
    ) -> Iterator[RequestState]:
        """These of those that wait, each once, in the order in which tenants get rows."""
        lines: dict[str, list[RequestState]] = {}
        for state in {state.request.row: state for state in some}.values():
            lines.setdefault(state.request.slo.tenant, []).append(state)
        for line in lines.values():
            line.sort(key=lambda state: self.spots[state.request.row])
        return in_turn(lines, turns, seconds)
