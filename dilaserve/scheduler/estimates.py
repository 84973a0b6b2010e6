"""Estimates: the seconds of a step, and the steps and seconds that a request still needs. They learn from each step."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from dilaserve.profile.block_chain import Chain, Outlook
from dilaserve.profile.decode_speed import QualityProfile, part_of
from dilaserve.profile.forecast import Forecast, Track
from dilaserve.profile.step_cost import Features, Learner, StepCost, derived
from dilaserve.scheduler.request_state import Loads, RequestState
from dilaserve.scheduler.rules.demand import alone, drifted
from dilaserve.scheduler.rules.step_kind import Work
from dilaserve.types import Request, Span

SMOOTH = 0.02  # weight of the newest step in the running mean of seconds spent outside the worker
NOTHING = Chain((0.0,), (0.0,), (0.0,))  # a block without masks


class StepClock:
    """Seconds of steps at one tensor-parallel degree: a cost law that learns, and the way to a worker and back."""

    def __init__(self, law: StepCost) -> None:
        self.learner = Learner(law)
        self.overhead = 0.0  # seconds of a round trip outside the worker

    @property
    def sure(self) -> bool:
        """Whether the cost law was measured, or learned from enough steps."""
        return not self.learner.law.guess

    @property
    def fixed(self) -> float:
        """Seconds that every step takes, whichever rows are in it; a few rows touch most experts."""
        law = self.learner.law
        return self.without_experts + law.expert * law.experts.of_layer * self.learner.factors[False]

    @property
    def without_experts(self) -> float:
        return self.learner.law.fixed * self.learner.factors[False] + self.overhead

    def refresh_seconds(self, state: RequestState) -> float:
        """What the row adds to a step that recomputes its whole canvas, or takes in a finished block and begins the
        next where K/V are exact.
        """
        decoding, canvas = state.request.decoding, state.request.canvas_tokens
        if decoding.traits.exact:
            tokens = decoding.block_length * (1 if state.takes_first else 2)
            return self.row_seconds(tokens, state.part.block_end, state.masks, True)
        return self.row_seconds(canvas, canvas, state.masks, True)

    def first_seconds(self, state: RequestState, limit: int) -> float:
        """What the row takes more than `refresh_seconds` until it has begun its block, as most of its prompt is to be
        computed, in steps of at most `limit` queries.
        """
        decoding, start, end = state.request.decoding, state.cached, state.part.block_end
        if not decoding.traits.exact or end - start <= 2 * decoding.block_length:
            return 0.0
        seconds = -self.refresh_seconds(state)
        while end - start > limit:
            start += limit
            seconds += self.fixed + self.row_seconds(limit, start, 0, True)
        return seconds + self.row_seconds(end - start, end, state.masks, True)

    def reuse_seconds(self, state: RequestState) -> float:
        """What the row adds to a step that reuses its K/V."""
        request = state.request
        if request.decoding.cache == "none":
            return self.refresh_seconds(state)
        part, canvas = state.part, request.canvas_tokens
        keys = part.block_end if request.decoding.traits.exact else canvas
        tokens = (canvas if request.decoding.cache == "prefix" else part.block_end) - part.block_start
        return self.row_seconds(tokens, keys, state.masks, False)

    def row_seconds(self, tokens: int, canvas: int, masks: int, refreshes: bool) -> float:
        """What a row with so many queries and a whole canvas of keys adds to a step."""
        learner = self.learner
        return learner.law.marginal(tokens, tokens * canvas, canvas, masks, 1) * learner.factors[refreshes]


class Estimates:
    """Cost laws by degree, and a quality profile. A degree without a law of its own gets one from the smallest.

    `max_tokens`: queries of a step, where a prompt may be computed in several.
    """

    def __init__(self, laws: Mapping[int, StepCost], quality: QualityProfile, max_tokens: int = 2**31) -> None:
        self.max_tokens = max_tokens
        self.paces = {degree: StepClock(law) for degree, law in laws.items()}
        self.base = min(laws)
        self.surely: set[int] = set()  # degrees whose law is known; it stays so
        self.reset(quality)

    def reset(self, quality: QualityProfile) -> None:
        """Start again from this profile."""
        self.forecast = Forecast(quality)

    # steps

    def pace(self, degree: int) -> StepClock:
        found = self.paces.get(degree)
        if found is None:
            found = self.paces[degree] = StepClock(derived(self.paces[self.base].learner.law, degree // self.base))
        return found

    def known(self) -> tuple[dict[int, StepCost], QualityProfile]:
        """The laws that are no guesses, by degree, and the quality profile, with all that was learned.

        What a step costs outside the worker counts as part of it.
        """
        laws = {
            degree: msgspec.structs.replace(pace.learner.law, fixed=pace.without_experts)
            for degree, pace in self.paces.items()
            if pace.sure
        }
        return laws, self.forecast.profile

    def sure(self, degrees: Sequence[int]) -> bool:
        """Whether the laws of all these degrees are known."""
        if self.surely.issuperset(degrees):
            return True
        self.surely.update([degree for degree in degrees if self.pace(degree).sure])
        return self.surely.issuperset(degrees)

    def work_seconds(self, state: RequestState, work: Work, degree: int) -> float:
        """What the row adds to its next step."""
        if work.refresh and state.request.decoding.traits.exact:
            return self.pace(degree).row_seconds(work.length, work.keys, state.masks, True)
        return self.step_seconds(state, work.refresh, degree)

    def step_seconds(self, state: RequestState, refresh: bool, degree: int) -> float:
        """What the row adds to a step of this kind."""
        loads = state.loads
        if loads is not None and loads.degree == degree:
            return loads.refresh if refresh else loads.reuse
        pace = self.pace(degree)
        return pace.refresh_seconds(state) if refresh else pace.reuse_seconds(state)

    def stepped(self, features: Features, refreshes: bool, seconds: float, turnaround: float, degree: int) -> None:
        """A step at this degree has taken `seconds` on the worker and `turnaround` seen from here."""
        pace = self.pace(degree)
        pace.learner.observe(features, refreshes, seconds)
        outside = min(max(0.0, turnaround - seconds), seconds + 2 * pace.overhead)  # the machine may have slept
        pace.overhead += SMOOTH * (outside - pace.overhead)

    # requests

    def levels(self, request: Request, thresholds: Sequence[float]) -> tuple[int, ...]:
        """Of the profile, by threshold of the request; the other rules have the law and the drop of the reference."""
        return tuple(map(self.forecast.level_of, thresholds)) if request.decoding.rule == "threshold" else (0,)

    def kind(self, request: Request) -> str:
        return self.forecast.kind(request.slo.task, request.prompt_tokens)

    def tracks(self, state: RequestState) -> list[Track]:
        """By the request's own levels; kept as long as it is in the same block and nothing was learned."""
        if state.tracked != (state.block, self.forecast.version):
            levels = self.levels(state.request, state.thresholds)
            place = state.block, state.blocks, state.request.decoding.block_length - state.takes_first
            state.tracks = self.forecast.tracks(state.kind, levels, *place)
            state.tracked = state.block, self.forecast.version
        return state.tracks

    def loads(self, state: RequestState, degree: int) -> Loads:
        """What the request still needs at this degree, by its own levels; kept until it has moved on."""
        loads = state.loads
        if loads is None or loads.degree != degree:
            pace = self.pace(degree)
            refresh, reuse = pace.refresh_seconds(state), pace.reuse_seconds(state)
            first = pace.first_seconds(state, self.max_tokens)
            if state.quotas:
                loads = Loads([counted(state)], 0, 0.0, 1.0, refresh, reuse, 0, degree, first)
            else:
                drift = drifted(state.observed, state.expected)
                due = 0.0 if state.fresh else 1.0
                interval = state.request.decoding.refresh_interval
                masks, firsts = state.block_masks - state.part.first, (state.part.first, state.takes_first)
                loads = Loads(self.tracks(state), masks, due, drift, refresh, reuse, interval, degree, first, firsts)
            state.loads = loads
        return loads

    def unloaded(self, state: RequestState, degree: int | None = None) -> float:
        """Seconds that the request takes alone at its reference threshold, by default on as few devices as can be."""
        degree = degree or self.base
        return alone(self.loads(state, degree)[0], self.pace(degree).fixed)

    def watched(
        self, state: RequestState, masks_before: int, block_before: int, unmasked: int, ended: bool, first: bool = False
    ) -> None:
        """After a step: compare the progress in the block with what the law expected of one step, and learn from it.

        The law says nothing of steps for the `first` token of a block.
        """
        if state.request.decoding.traits.noise_steps:
            self.watched_noise(state, masks_before, unmasked, ended)
            return
        if state.quotas or state.request.decoding.rule != "threshold" or first or not masks_before:
            return
        forecast, kind = self.forecast, state.kind
        level, part = forecast.level_of(state.table_threshold), part_of(block_before)
        steps = forecast.chain(kind, level, part, state.request.decoding.block_length).steps
        left = steps[state.block_masks] if state.block == block_before else 0.0
        forecast.observe(kind, level, part, masks_before, 0 if ended else unmasked)
        state.observed += 1.0
        state.expected += steps[masks_before] - left

    def watched_noise(self, state: RequestState, masks: int, unmasked: int, ended: bool) -> None:
        """After a step of a block that began as noise: once it is finished, as if its steps had shared its tokens."""
        if not unmasked:
            return
        steps, level, part = max(1, state.block_steps), 0, part_of(state.place - 1)
        for place in range(steps):
            left, after = (masks * (steps - done) // steps for done in (place, place + 1))
            if left:
                last = ended and place == steps - 1
                self.forecast.observe(state.kind, level, part, left, 0 if last else max(1, left - after))


def counted(state: RequestState) -> Track:
    """Under the steps rule the future is known."""
    left = sum(map(len, state.quotas[state.place :])) - state.part_step
    refreshes = state.blocks - state.block - state.fresh
    return Track(NOTHING, Outlook(left, 0.0, refreshes))


def batch_features(spans: Iterable[Span], masks: int) -> Features:
    tokens = attention = keys = rows = 0
    for span in spans:
        tokens += span.length
        attention += span.length * span.keys
        keys += span.keys
        rows += 1
    return Features(tokens, attention, keys, masks, rows)
