"""What has arrived lately, in classes of length and tightness. It remembers; the clock is an argument."""

import math
from collections import Counter, deque
from typing import NamedTuple

from dilaserve.fleet import NEVER, Kind

WINDOW = 4.0  # seconds that are looked back on
CLASSES = 6  # at most; the rest joins the nearest
FINER = 3.0  # classes of tightness by doubling


class Stream(NamedTuple):
    """One class of requests that keeps coming: its mean kind, requests a second, and how many wait already.

    `seen` requests are behind it; `tightness` is the deadline over the unloaded latency.
    """

    kind: Kind
    tightness: float
    rate: float
    backlog: int
    seen: int

    @property
    def name(self) -> str:
        hurry = "without deadline" if self.tightness == NEVER else f"at {self.tightness:.2g}x"
        return f"{hurry} of {self.kind.canvas} tokens"


class Label(NamedTuple):
    """The class of one request: octave of its canvas, third of an octave of its tightness (99: no deadline), task."""

    length: int
    hurry: int
    task: str | None


class Seen(NamedTuple):
    at: float
    label: Label
    kind: Kind
    tightness: float


class Traffic:
    """The arrivals of the last seconds."""

    def __init__(self, window: float = WINDOW) -> None:
        self.window = window
        self.recent: deque[Seen] = deque()
        self.began: float | None = None

    def arrived(self, kind: Kind, unloaded: float, now: float) -> None:
        """A request that would take `unloaded` seconds alone, on one device at the reference threshold."""
        self.began = now if self.began is None else self.began
        tightness = kind.deadline / unloaded
        hurry = 99 if tightness == NEVER else round(FINER * math.log2(max(tightness, 1e-3)))
        label = Label(round(math.log2(kind.canvas)), hurry, kind.task)
        self.recent.append(Seen(now, label, kind, tightness))
        self.forget(now)

    def forget(self, now: float) -> None:
        while self.recent and self.recent[0].at <= now - self.window:
            self.recent.popleft()

    def streams(self, now: float, backlog: int = 0) -> tuple[Stream, ...]:
        """The classes of the window, the largest first; `backlog` requests wait, of all classes alike."""
        self.forget(now)
        if not self.recent or self.began is None:
            return ()
        counts = Counter(one.label for one in self.recent)
        kept = [label for label, _ in counts.most_common(CLASSES)]
        members: dict[Label, list[Seen]] = {label: [] for label in kept}
        for one in self.recent:
            members[min(kept, key=lambda label: distance(label, one.label))].append(one)
        looked = min(self.window, max(1.0, now - self.began))
        total = len(self.recent)
        return tuple(stream(found, looked, round(backlog * len(found) / total)) for found in members.values())


def distance(one: Label, other: Label) -> tuple[int, bool]:
    return abs(one.hurry - other.hurry) + abs(one.length - other.length), one.task != other.task


def stream(members: list[Seen], window: float, backlog: int) -> Stream:
    """Means of one class; rounded, so that alike classes of the next window find the same table."""
    kinds, count = [one.kind for one in members], len(members)
    kind = Kind(
        canvas=step(sum(one.canvas for one in kinds) / count),
        answer=step(sum(one.answer for one in kinds) / count),
        deadline=near(sum(one.deadline for one in kinds) / count),
        weight=sum(one.weight for one in kinds) / count,
        task=kinds[0].task,
    )
    return Stream(kind, near(sum(one.tightness for one in members) / count), count / window, backlog, count)


def step(tokens: float) -> int:
    """Whole blocks of 32."""
    return max(32, 32 * round(tokens / 32))


def near(value: float) -> float:
    """Steps of 3 %."""
    return value if value == NEVER or value <= 0 else 1.03 ** round(math.log(value) / math.log(1.03))
