"""What happened in each of the last seconds: a ring that a timer fills from the engine's counters."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from dilaserve.engine.engine import Engine
from dilaserve.engine.observer import Ended
from dilaserve.engine.request_views import thresholds_in_force, under_way
from dilaserve.types import Request

KEPT = 600  # seconds
LATELY = 10.0  # seconds of answers that the latencies of one second are of
MOST_ANSWERS = 2048  # of these


class Counts(msgspec.Struct, frozen=True):
    """Counters: since the start, or of one second."""

    arrivals: int
    answered: int
    met: int
    late: int
    declined: int
    tokens: int


class Second(Counts, frozen=True):
    """One second of the server, which ended `at`, in Unix seconds.

    Of requests that came or ended in it: `arrivals`, `answered` ones, and of those with a deadline `met`, `late` and
    `declined` (refused and failed ones too); `tokens` that were unmasked in it. At its end: requests `running` and
    `waiting`. `p50`, `p90`, `p99`: seconds from arrival to the end that so many of the answers of the last ten seconds
    took at most. `threshold`, `lowest_threshold`: mean and least of requests that run or have ended in it, if they go
    by one. `budget_used`: the share of the accuracy budget that is used; `accuracy_drop`: the mean of all answers, in
    points. None where there is nothing to tell.
    """

    at: float
    running: int
    waiting: int
    p50: float | None
    p90: float | None
    p99: float | None
    threshold: float | None
    lowest_threshold: float | None
    budget_used: float | None
    accuracy_drop: float


class History:
    """An observer of requests with a timer of its own, between `start` and `close`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: deque[Second] = deque(maxlen=KEPT)
        self.answers: deque[tuple[float, float]] = deque(maxlen=MOST_ANSWERS)  # instant of the end, latency
        self.thresholds: list[float] = []  # of the answers of this second
        self.counted = counts(engine)
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.timer = self.engine.loop.call_later(1.0, self.tick)

    def close(self) -> None:
        if self.timer:
            self.timer.cancel()

    def tick(self) -> None:
        self.start()
        self.take(self.engine.loop.time(), time.time())

    def emitted(self, request: Request, tokens: int, since: float | None, now: float) -> None:
        """Tokens are counted by the engine."""

    def ended(self, ended: Ended) -> None:
        if ended.fate == "answered" and ended.usage:
            self.answers.append((ended.ended_at, ended.usage.queued + ended.usage.served))
            known = (ended.usage.min_threshold, ended.usage.mean_threshold)
            self.thresholds += [threshold for threshold in known if threshold is not None]

    def take(self, now: float, at: float) -> None:
        """Add the second that ends now."""
        while self.answers and self.answers[0][0] < now - LATELY:
            self.answers.popleft()
        before, self.counted = self.counted, counts(self.engine)
        latencies = [seconds for _, seconds in self.answers]
        thresholds = self.thresholds + thresholds_in_force(self.engine.scheduler)
        self.thresholds = []
        self.seconds.append(second(self.engine, before, self.counted, latencies, thresholds, at))


def counts(engine: Engine) -> Counts:
    totals = engine.scheduler.totals
    fates = totals.deadlines
    return Counts(
        arrivals=totals.received,
        answered=totals.fates["answered"],
        met=fates["met"],
        late=fates["missed"],
        declined=fates["declined"] + fates["refused"] + fates["failed"],
        tokens=totals.unmasked,
    )


def second(
    engine: Engine,
    before: Counts,
    after: Counts,
    latencies: Sequence[float],
    thresholds: Sequence[float],
    at: float,
) -> Second:
    """The second between two counts, with the latencies of the last answers."""
    ordered, ledger = sorted(latencies), engine.scheduler.deadlines.ledger
    running, waiting = under_way(engine.scheduler)
    return Second(
        at=round(at, 3),
        **{name: getattr(after, name) - getattr(before, name) for name in Counts.__struct_fields__},
        running=running,
        waiting=waiting,
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        threshold=sum(thresholds) / len(thresholds) if thresholds else None,
        lowest_threshold=min(thresholds, default=None),
        budget_used=ledger.used,
        accuracy_drop=ledger.all.spent / max(1.0, ledger.all.served),
    )


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest of the ordered values that at least this share of them does not exceed; None of none."""
    return round(ordered[math.ceil(share * len(ordered)) - 1], 6) if ordered else None
