"""What has arrived lately, by length and by how tight the deadlines are."""

from bisect import bisect
from collections import deque
from typing import NamedTuple

from dilaserve.terms import Flow

WINDOW = 5.0  # seconds
EDGES = (0.7, 1.2, 2.0, 4.0)  # of the deadline over the time alone on one device


class Seen(NamedTuple):
    at: float
    canvas_tokens: int
    answer_tokens: int
    tightness: float | None


class Traffic:
    """Arrivals of the last few seconds."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.arrivals: deque[Seen] = deque()

    def arrived(self, seen: Seen) -> None:
        if self.since is None:
            self.since = seen.at
        self.arrivals.append(seen)
        self.forget(seen.at)

    def forget(self, now: float) -> None:
        while self.arrivals and self.arrivals[0].at < now - WINDOW:
            self.arrivals.popleft()

    def seconds(self, now: float) -> float:
        """The time that the flows are an average over."""
        return WINDOW if self.since is None else min(WINDOW, max(1.0, now - self.since))

    def flows(self, now: float) -> tuple[Flow, ...]:
        """Arrivals by kind: lengths up to the next power of two, and five grades of tightness or no deadline."""
        self.forget(now)
        kinds: dict[tuple[int, int, int], list[Seen]] = {}
        for seen in self.arrivals:
            grade = -1 if seen.tightness is None else bisect(EDGES, seen.tightness)
            kinds.setdefault((ceiling(seen.canvas_tokens), ceiling(seen.answer_tokens), grade), []).append(seen)
        span = self.seconds(now)
        return tuple(
            Flow(
                canvas_tokens=canvas,
                answer_tokens=answer,
                tightness=None if grade < 0 else sum(one.tightness or 0.0 for one in kinds[key]) / len(kinds[key]),
                rate=len(kinds[key]) / span,
            )
            for key in sorted(kinds)
            for canvas, answer, grade in [key]
        )


def ceiling(tokens: int) -> int:
    """The next power of two."""
    return 1 << (tokens - 1).bit_length()
