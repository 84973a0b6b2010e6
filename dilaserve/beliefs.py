"""What the scheduler believes of the future: seconds of a step, and steps and seconds that a request still needs."""

import math
from collections.abc import Iterable, Sequence

from dilaserve.cost import Features, Learner, StepCost
from dilaserve.policy.demand import drifted, load
from dilaserve.progress import Progress
from dilaserve.quality import Forecast, Outlook, QualityProfile, part_of
from dilaserve.terms import Load, Request, Span

SMOOTH = 0.02


class Beliefs:
    """A cost law that learns, a quality profile, and the time that the road to a worker and back takes."""

    def __init__(self, law: StepCost, quality: QualityProfile) -> None:
        self.learner = Learner(law)
        self.forecast = Forecast(quality)
        self.levels = quality.levels
        self.nearest: dict[float, int] = {}
        self.overhead = 0.0  # seconds of a round trip outside the worker

    # steps

    @property
    def sure(self) -> bool:
        """Whether the cost law was measured, or learned from enough steps."""
        return not self.learner.law.guess

    @property
    def fixed(self) -> float:
        """Seconds that every step takes, whoever is in it."""
        return self.learner.law.fixed * math.exp(self.learner.corrections[False]) + self.overhead

    def variable(self, features: Features, refresh: bool) -> float:
        return self.learner.law.variable(features) * math.exp(self.learner.corrections[refresh])

    def refresh_seconds(self, progress: Progress) -> float:
        """What the row adds to a step that recomputes its whole canvas."""
        canvas = progress.request.canvas_tokens
        return self.variable(Features(canvas, canvas * canvas, progress.masks, 1), True)

    def reuse_seconds(self, progress: Progress) -> float:
        """What the row adds to a step that reuses its K/V."""
        request = progress.request
        if request.decoding.cache == "none":
            return self.refresh_seconds(progress)
        end = progress.block_end if request.decoding.cache == "dual" else request.canvas_tokens
        tokens = end - progress.block_start
        return self.variable(Features(tokens, tokens * request.canvas_tokens, progress.masks, 1), False)

    def stepped(self, features: Features, refreshes: bool, seconds: float, turnaround: float) -> None:
        """A step has taken `seconds` on the worker and `turnaround` seen from here."""
        self.learner.observe(features, refreshes, seconds)
        self.overhead += SMOOTH * (max(0.0, turnaround - seconds) - self.overhead)

    # requests

    def level_of(self, threshold: float) -> int:
        """The level of the profile that is nearest above this threshold."""
        level = self.nearest.get(threshold)
        if level is None:
            level = max((i for i, known in enumerate(self.levels) if known >= threshold - 1e-6), default=0)
            self.nearest[threshold] = level
        return level

    def drops(self, request: Request, thresholds: Sequence[float]) -> tuple[float, ...]:
        """Points of accuracy that each threshold costs against the reference, for the request's task."""
        if request.decoding.rule != "threshold":
            return (0.0,)
        return tuple(self.forecast.drop(request.slo.task, self.level_of(threshold)) for threshold in thresholds)

    def mean_drops(self, request: Request, thresholds: Sequence[float]) -> tuple[float, ...]:
        """The estimates themselves, where `drops` are on the safe side."""
        if request.decoding.rule != "threshold":
            return (0.0,)
        return tuple(self.forecast.mean_drop(request.slo.task, self.level_of(threshold)) for threshold in thresholds)

    def ahead(self, progress: Progress, threshold: float, masks: int | None = None) -> Outlook:
        """Steps and refreshes that the request still needs, before drift."""
        decoding = progress.request.decoding
        if progress.quotas:
            left = sum(map(len, progress.quotas[progress.block :])) - progress.block_step
            return Outlook(left, 0.0, len(progress.quotas) - progress.block - progress.fresh)
        level = self.level_of(threshold) if decoding.rule == "threshold" else 0
        outlook = self.forecast.outlook(
            progress.request.slo.task,
            level,
            progress.block,
            progress.masks if masks is None else masks,
            len(progress.blocks),
            decoding.block_length,
            progress.fresh,
        )
        if decoding.refresh_interval:
            outlook = outlook._replace(refreshes=max(outlook.refreshes, outlook.steps / decoding.refresh_interval))
        return outlook

    def loads(self, progress: Progress) -> tuple[Load, ...]:
        """What the request still needs, by its own levels; kept until it has moved on."""
        if progress.loads is None:
            refresh, reuse = self.refresh_seconds(progress), self.reuse_seconds(progress)
            drift = drifted(progress.observed, progress.expected)
            outlooks = (self.ahead(progress, threshold) for threshold in progress.thresholds)
            progress.loads = tuple(load(one.steps, one.refreshes, drift, refresh, reuse) for one in outlooks)
        return progress.loads

    def unloaded(self, progress: Progress) -> float:
        """Seconds that the request takes alone at its reference threshold."""
        need = self.loads(progress)[0]
        return need.steps * self.fixed + need.work

    def watched(self, progress: Progress, masks_before: int, block_before: int, unmasked: int, ended: bool) -> None:
        """After a step: compare the progress in the block with what the law expected of one step, and learn from it."""
        if progress.quotas or progress.request.decoding.rule != "threshold":
            return
        level = self.level_of(progress.told)
        name = self.forecast.name(progress.request.slo.task)
        part = part_of(block_before)
        steps = self.forecast.chain(name, level, part, progress.request.decoding.block_length).steps
        left = steps[progress.masks] if progress.block == block_before else 0.0
        self.forecast.observe(progress.request.slo.task, level, part, masks_before, 0 if ended else unmasked)
        progress.observed += 1.0
        progress.expected += steps[masks_before] - left


def batch_features(spans: Iterable[Span], masks: int) -> Features:
    tokens = attention = rows = 0
    for span in spans:
        tokens += span.length
        attention += span.length * span.keys
        rows += 1
    return Features(tokens, attention, masks, rows)
