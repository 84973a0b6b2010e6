"""Batches of one step or of several: what an instance is told, what it reports, when it had better end or is hung."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from dilaserve.config import Config
from dilaserve.scheduler.estimates import Beliefs, batch_features
from dilaserve.scheduler.placement import House
from dilaserve.scheduler.request_state import Progress, Ready, Seat, State
from dilaserve.scheduler.rules.best_effort import after_step
from dilaserve.scheduler.rules.composition import COMPOSITIONS, Candidate
from dilaserve.scheduler.rules.fairness import Ride, allowances, left_over, riders
from dilaserve.scheduler.rules.time_limits import step_limit
from dilaserve.types import Batch, Hurry, RowResult, Span

AHEAD = 8  # blocks that the rows of a launch may begin in it after their first, all together, but at least one each
MOST_AHEAD = 32  # rows; among more there is always one whose answer ends


class Launches:
    """The batches of all instances. `repeats`: steps that one may have."""

    def __init__(self, config: Config, house: House, beliefs: Beliefs, repeats: int) -> None:
        policy = config.scheduler
        self.house, self.beliefs, self.repeats = house, beliefs, repeats
        self.patience = policy.step_timeout
        self.share = policy.best_effort_share
        self.compose = COMPOSITIONS[policy.scheduling]
        self.cap = policy.batch_cap or house.max_rows
        self.max_tokens = config.device.max_num_batched_tokens
        self.batches = 0
        self.kills: Counter[int] = Counter()  # of hung steps by degree, until steps of it are known to be done

    def ready(self, progress: Progress, degree: int) -> Ready:
        """Kept until the row has stepped."""
        ready = progress.ready
        if ready is None or ready.degree != degree:
            work = progress.next_work()
            seconds = self.beliefs.step_seconds(progress, work.refresh, degree)
            ready = progress.ready = Ready(degree, work, Candidate(progress.request.row, work.length, seconds))
        return ready

    def fitting(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Who of them is in one step; they stand in the order of service."""
        return self.compose(candidates, self.max_tokens, self.cap)

    def shared(self, seat: Seat, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same where tenants share the step's time; `seat` keeps what each has saved up."""
        rides = [Ride(seat.residents[one.key].request.slo.tenant, one.seconds) for one in candidates]
        if len({ride.tenant for ride in rides}) == 1:
            seat.credits = {}
            return self.fitting(candidates)
        allowed = allowances(rides, seat.credits, self.beliefs.pace(seat.degree).fixed)
        chosen = self.fitting([candidates[place] for place in riders(rides, allowed)])
        keys = {one.key for one in chosen}
        rode = [place for place, one in enumerate(candidates) if one.key in keys]
        seat.credits = left_over(rides, allowed, rode)
        return chosen

    def keeping(self, seat: Seat, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same where deadlines are kept; `seat` keeps what best-effort rows may add to its steps."""
        chosen = self.fitting(candidates)
        with_deadline = sum(one.seconds for one in chosen if seat.residents[one.key].promised)
        led = 0.0 if seat.residents[candidates[0].key].promised else candidates[0].seconds
        seat.saved = after_step(seat.saved, self.share, self.beliefs.pace(seat.degree).fixed + with_deadline, led)
        return chosen

    def begin(self, seat: Seat, candidates: Sequence[Candidate], now: float) -> Batch:
        """The next batch of the instance, of these rows, noted in their progress and at their seat."""
        chosen = [seat.residents[candidate.key] for candidate in candidates]
        fixed = self.beliefs.pace(seat.degree).fixed
        works = [self.ready(progress, seat.degree).work for progress in chosen]
        spans = [progress.span(work) for progress, work in zip(chosen, works, strict=True)]
        masks, refreshing = sum(progress.masks for progress in chosen), any(work.refresh for work in works)
        seconds = [candidate.seconds for candidate in candidates]
        seat.shares, seat.refreshing = shares(fixed, seconds), refreshing
        seat.features = batch_features(spans, masks)
        seat.added = dict(zip([candidate.key for candidate in candidates], seconds, strict=True))
        seat.ends_at = now + fixed + sum(seconds)
        self.batches += 1
        steps, longest, then = self.steps(seat, chosen), seconds, []
        if steps > 1:
            longest = [self.beliefs.step_seconds(progress, True, seat.degree) for progress in chosen]
            ahead = self.ahead(candidates, longest, steps)
            then = [progress.stages(span, ahead) for progress, span in zip(chosen, spans, strict=True)]
        batch = Batch(self.batches, seat.instance.id, tuple(spans), steps, tuple(then))
        for progress, work in zip(chosen, works, strict=True):  # last: an error before leaves rows as they are
            progress.launched(work, now)
        seat.flying, seat.batch, seat.spans = chosen, batch, spans
        seat.went_on, seat.hurried, seat.disturbed, seat.launched_at = False, False, False, now
        seat.overdue_at = math.ceil(now + self.limit(seat, (fixed + sum(longest)) * steps))
        return batch

    def limit(self, seat: Seat, predicted: float) -> float:
        """Seconds after which steps on the instance that should take so many count as hung."""
        known = self.beliefs.pace(seat.degree).sure
        return step_limit(self.patience, predicted, known, self.kills[seat.degree])

    def hung(self, seat: Seat, now: float) -> None:
        """A step on the instance counts as hung; it is looked at again in case the instance does not go."""
        self.kills[seat.degree] += not seat.killed
        seat.killed = True
        seat.overdue_at = math.ceil(now + self.limit(seat, 0.0))

    def done(self, degree: int) -> None:
        """A step at this degree is done. While its cost is a guess that says nothing of slower ones."""
        if self.kills and self.beliefs.pace(degree).sure:
            del self.kills[degree]

    def steps(self, seat: Seat, chosen: Sequence[Progress]) -> int:
        """How often the batch is stepped at most: until a row changes how, and once if anybody waits."""
        if self.repeats == 1 or seat.degree > 1 or self.calls(seat, chosen):
            return 1
        return min(progress.steady(self.repeats) for progress in chosen)

    def ahead(self, candidates: Sequence[Candidate], refreshes: Sequence[float], steps: int) -> int:
        """Blocks that a row may begin in a launch after its present one: none where deadlines would not bear it that
        all rows refresh as often. `refreshes`: seconds of one, by row.
        """
        rows = len(candidates)
        if rows > MOST_AHEAD:
            return 0
        blocks = min(steps - 1, max(1, AHEAD // rows))
        worst = [
            Candidate(candidate.key, 0, blocks * seconds, candidate.slack)
            for candidate, seconds in zip(candidates, refreshes, strict=True)
        ]
        worst.sort(key=lambda one: math.inf if one.slack is None else one.slack)
        return blocks if len(self.fitting(worst)) == rows else 0

    def calls(self, seat: Seat, chosen: Sequence[Progress]) -> bool:
        """Whether somebody waits for the instance while it works for the chosen."""
        house = self.house
        return bool(house.queue or house.waiting or house.moving or len(chosen) < len(seat.residents))

    def hurry(self) -> Iterator[Hurry]:
        """Let batches of several steps end soon: somebody waits, a row in them has left, or the instance is to go."""
        if self.repeats == 1:
            return
        for seats in (self.house.seats, self.house.closing):
            for seat in seats.values():
                if seat.flying is None or seat.batch is None or seat.batch.steps == 1 or seat.hurried:
                    continue
                left = any(progress.state is State.LEAVING for progress in seat.flying)
                if left or seats is self.house.closing or self.calls(seat, seat.flying):
                    seat.hurried = True
                    yield Hurry(seat.batch)

    def reported(self, seat: Seat, flying: Sequence[Progress], results: Sequence[RowResult]) -> None:
        """Note what a step was that a batch took after its first, as the worker reports it.

        What the device did for a row that rested is part of the step and of none of the row's counts.
        """
        masks, seconds, refreshing = 0, [], False
        for place, (progress, result) in enumerate(zip(flying, results, strict=True)):
            span = seat.spans[place] = stage(seat, place, result)
            refresh = refreshes(span) and not result.rested
            if progress.state is State.STEPPING and not result.rested:
                assert span.block_start == progress.block_start
                progress.took(refresh)
            masks += result.unmasked + result.masks_left
            refreshing |= refresh
            seconds.append(self.beliefs.step_seconds(progress, refresh, seat.degree))
        seat.features, seat.refreshing = batch_features(seat.spans, masks), refreshing
        seat.shares = shares(self.beliefs.pace(seat.degree).fixed, seconds)


def stage(seat: Seat, place: int, result: RowResult) -> Span:
    """The span that the row at this place of the batch has taken."""
    assert seat.batch is not None
    return seat.batch.then[place][result.stage - 1] if result.stage else seat.batch.spans[place]


def refreshes(span: Span) -> bool:
    """Whether the step rewrites all K/V of the row."""
    return span.length == span.keys


def shares(fixed: float, seconds: Sequence[float]) -> list[float]:
    """Of a step's time, by row: what each adds, and an even part of what every step takes."""
    total, even = fixed + sum(seconds), fixed / len(seconds)
    return [(even + one) / total for one in seconds]
