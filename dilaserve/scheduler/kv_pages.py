"""Which row owns which part of an instance's K/V pool. It counts tokens and knows no tensors."""

from bisect import insort
from collections.abc import Sequence

from dilaserve.types import PAGE


class PagePool:
    """Hands out contiguous runs of pages, first fit, and joins what comes back.

    A row's canvas never grows, so one run per row is enough and attention reads its K/V without a gather.
    """

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens // PAGE * PAGE
        self.free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []
        self.runs: dict[int, int] = {}

    def take(self, tokens: int) -> int | None:
        """The first token of a run of at least `tokens`, or None while there is no such run."""
        need = rounded(tokens)
        for index, (start, length) in enumerate(self.free):
            if length >= need:
                self.free[index : index + 1] = [(start + need, length - need)] if length > need else []
                self.runs[start] = need
                return start
        return None

    def give(self, start: int) -> None:
        insort(self.free, (start, self.runs.pop(start)))
        self.free = coalesced(self.free)

    def fits_without(self, tokens: int, starts: Sequence[int]) -> bool:
        """Whether there is a run of at least `tokens` once the runs that begin at `starts` are given back."""
        free = coalesced(sorted([*self.free, *[(start, self.runs[start]) for start in starts]]))
        return any(length >= rounded(tokens) for _, length in free)

    def ever_fits(self, tokens: int) -> bool:
        return rounded(tokens) <= self.capacity


def rounded(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE


def coalesced(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged
