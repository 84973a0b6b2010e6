"""The recent traffic: arrivals by length and tightness of deadline, and how many requests were on time."""

from bisect import bisect
from collections import deque
from statistics import fmean
from typing import NamedTuple

from dilaserve.types import Flow

WINDOW = 5.0  # seconds of traffic that the planner sees; longer windows react later and err less
EDGES = (0.65, 0.9, 1.2, 1.7, 2.5, 4.5)  # of tightness, deadline over unloaded time; off the round figures clients use


class Seen(NamedTuple):
    at: float
    canvas_tokens: int
    answer_tokens: int
    tightness: float | None


class End(NamedTuple):
    at: float
    met: bool


class Traffic:
    """Arrivals of the last few seconds, and the ends of those that have arrived since the plan changed."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.arrivals: deque[Seen] = deque()
        self.changed_at = 0.0
        self.ends: deque[End] = deque()

    def begins(self, now: float) -> bool:
        """Whether the first arrival of all was less than a window ago."""
        return self.since is not None and now < self.since + WINDOW

    def changed(self, now: float) -> None:
        """Another plan is in force; requests that arrived before it say nothing about it."""
        self.changed_at = now
        self.ends.clear()

    def ended(self, arrived_at: float, met: bool, now: float) -> None:
        """A request with a deadline has ended."""
        if arrived_at >= self.changed_at:
            self.ends.append(End(now, met))
        self.forget(now)

    def outcome(self, now: float) -> tuple[int, int]:
        """Requests that were in time, and all that have ended. None as long as the last ones to come have hardly had
        the time to miss a deadline.
        """
        self.forget(now)
        if now < self.changed_at + WINDOW:
            return 0, 0
        return sum(end.met for end in self.ends), len(self.ends)

    def arrived(self, seen: Seen) -> None:
        if self.since is None:
            self.since = seen.at
        self.arrivals.append(seen)
        self.forget(seen.at)

    def forget(self, now: float) -> None:
        while self.arrivals and self.arrivals[0].at < now - WINDOW:
            self.arrivals.popleft()
        while self.ends and self.ends[0].at < now - WINDOW:
            self.ends.popleft()

    def seconds(self, now: float) -> float:
        """The time that the flows are an average over."""
        return WINDOW if self.since is None else min(WINDOW, max(1.0, now - self.since))

    def flows(self, now: float) -> tuple[Flow, ...]:
        """Arrivals by kind, each with its means: lengths up to the same power of two, and one grade of tightness."""
        self.forget(now)
        kinds: dict[tuple[int, int, int], list[Seen]] = {}
        for seen in self.arrivals:
            grade = -1 if seen.tightness is None else bisect(EDGES, seen.tightness)
            kinds.setdefault((ceiling(seen.canvas_tokens), ceiling(seen.answer_tokens), grade), []).append(seen)
        span = self.seconds(now)
        return tuple(
            Flow(
                canvas_tokens=round(fmean(one.canvas_tokens for one in alike)),
                answer_tokens=round(fmean(one.answer_tokens for one in alike)),
                tightness=None if alike[0].tightness is None else fmean(one.tightness or 0.0 for one in alike),
                rate=len(alike) / span,
            )
            for _, alike in sorted(kinds.items())
        )


def ceiling(tokens: int) -> int:
    """The next power of two."""
    return 1 << (tokens - 1).bit_length()
