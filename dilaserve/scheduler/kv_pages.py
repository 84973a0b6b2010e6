"""Which row owns which part of an instance's K/V pool, and which runs hold K/V of a prompt that others may begin with.

It counts tokens and knows no tensors.
"""

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from dilaserve.types import PAGE


class PrefixHit(NamedTuple):
    """K/V of the first `tokens` of a prompt lie in the run that begins at `start`."""

    start: int
    tokens: int


class PagePool:
    """Hands out contiguous runs of pages, first fit, and joins what comes back: attention reads K/V without a gather.

    A run with exact K/V of a prompt may be `published` under the hashes of its beginnings, one a page.
    Behind its row it is `kept` until its pages are needed, from its end on, the one that was not used for the longest
    time first.
    """

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens // PAGE * PAGE
        self.free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []
        self.runs: dict[int, int] = {}  # length by start, of rows
        self.kept: dict[int, int] = {}  # the same of runs without a row, the longest unused first
        self.published: dict[int, tuple[int, ...]] = {}  # hashes by start
        self.holders: dict[int, dict[int, None]] = {}  # starts by hash

    def take(self, tokens: int, spare: int = 0) -> int | None:
        """The first token of a run of at least `tokens`, or None while there is no such run.

        `spare`: so many tokens must be free or kept behind that, too.
        """
        need = rounded(tokens)
        if spare and self.unused < need + spare:
            return None
        start = self._first_fit(need)
        if start is None and self.kept and self._could_fit(need):
            while start is None:
                self._drop()
                start = self._first_fit(need)
        return start

    @property
    def unused(self) -> int:
        """Tokens that no row owns."""
        return sum(length for _, length in self.free) + sum(self.kept.values())

    def give(self, start: int) -> None:
        """The row needs its run no longer. What only this run has published stays until its pages are needed."""
        length = self.runs.pop(start)
        hashes = self.published.get(start, ())
        if not hashes or all(len(self.holders[one]) > 1 for one in hashes):
            self._unpublish(start)
            self._free(start, length)
            return
        held = min(length, len(hashes) * PAGE)
        self.kept[start] = held
        if held < length:
            self._free(start + held, length - held)

    def grow(self, start: int, tokens: int) -> int | None:
        """Make the run of a row longer, at another place if need be: its new first token, or None if there is no room.

        K/V must then be moved there; both places may overlap.
        """
        old, need = self.runs[start], rounded(tokens)
        if not self._could_fit(need, (start,)):
            return None
        del self.runs[start]
        hashes = self.published.get(start, ())
        before = self.free
        while True:
            self.free = coalesced(sorted([*before, (start, old)]))
            place = start if self._fits_at(start, need) else self._first_start(need)
            if place is not None:
                break
            self.free = before
            self._drop()
            before = self.free
        self._carve(place, need)
        if place != start and hashes:
            self._unpublish(start)
            self.publish(place, hashes)
        return place

    def publish(self, start: int, hashes: Sequence[int]) -> None:
        """The run holds exact K/V of the prompt beginnings with these hashes."""
        self._unpublish(start)
        self.published[start] = tuple(hashes)
        for one in hashes:
            self.holders.setdefault(one, {})[start] = None

    def find(self, hashes: Sequence[int]) -> PrefixHit | None:
        """The longest beginning of a prompt whose K/V some run holds."""
        for count in range(len(hashes), 0, -1):
            if found := self.holders.get(hashes[count - 1]):
                start = next(iter(found))
                if start in self.kept:
                    self.kept[start] = self.kept.pop(start)
                return PrefixHit(start, count * PAGE)
        return None

    def held(self, hashes: Sequence[int]) -> int:
        """Pages of the prompt's beginning whose K/V some run holds."""
        return next((count for count in range(len(hashes), 0, -1) if hashes[count - 1] in self.holders), 0)

    def fits_without(self, tokens: int, starts: Sequence[int]) -> bool:
        """Whether there is a run of at least `tokens` once the runs that begin at `starts` are given back."""
        return self._could_fit(rounded(tokens), starts)

    def ever_fits(self, tokens: int) -> bool:
        return rounded(tokens) <= self.capacity

    def _could_fit(self, need: int, starts: Sequence[int] = ()) -> bool:
        """Whether there is such a run once no run is kept, and those that begin at `starts` are given back."""
        given = [(start, self.runs[start]) for start in starts]
        free = coalesced(sorted([*self.free, *self.kept.items(), *given]))
        return any(length >= need for _, length in free)

    def _first_start(self, need: int) -> int | None:
        return next((start for start, length in self.free if length >= need), None)

    def _first_fit(self, need: int) -> int | None:
        start = self._first_start(need)
        if start is not None:
            self._carve(start, need)
        return start

    def _fits_at(self, start: int, need: int) -> bool:
        return any(first <= start and start + need <= first + length for first, length in self.free)

    def _carve(self, start: int, need: int) -> None:
        """Take `[start, start + need)` out of the free run that holds it."""
        index = next(i for i, (first, length) in enumerate(self.free) if first <= start < first + length)
        first, length = self.free[index]
        parts = (first, start - first), (start + need, first + length - start - need)
        self.free[index : index + 1] = [part for part in parts if part[1]]
        self.runs[start] = need

    def _free(self, start: int, length: int) -> None:
        insort(self.free, (start, length))
        self.free = coalesced(self.free)

    def _drop(self) -> None:
        """Free the last page of the kept run that was unused for the longest time: its beginning serves more others."""
        start = next(iter(self.kept))
        left = self.kept[start] - PAGE
        hashes = self.published[start][: left // PAGE]
        if left:
            self.kept[start] = left
            self.publish(start, hashes)
        else:
            del self.kept[start]
            self._unpublish(start)
        self._free(start + left, PAGE)

    def _unpublish(self, start: int) -> None:
        for one in self.published.pop(start, ()):
            del self.holders[one][start]
            if not self.holders[one]:
                del self.holders[one]


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
