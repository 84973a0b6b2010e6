"""Batches of one step or several: what is sent to an instance, what it reports, when to stop early or count as hung."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from dilaserve.config import Config
from dilaserve.scheduler.estimates import Estimates, batch_features
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.request_state import ReadyRow, RequestState, Status, Transition
from dilaserve.scheduler.rules.best_effort import after_step
from dilaserve.scheduler.rules.composition import COMPOSITIONS, Candidate
from dilaserve.scheduler.rules.fairness import Ride, allowances, left_over, riders
from dilaserve.scheduler.rules.time_limits import step_limit
from dilaserve.types import Batch, RowResult, Span, StopEarly

AHEAD = 8  # blocks that all rows of one launch together may begin after their first; each row may begin one anyway
MOST_AHEAD = 32  # rows above which a launch begins no further blocks: one of so many always ends


class Batcher:
    """The batches of all instances. `repeats`: steps that one may have."""

    def __init__(self, config: Config, placement: Placement, estimates: Estimates, repeats: int) -> None:
        policy = config.scheduler
        self.placement, self.estimates, self.repeats = placement, estimates, repeats
        self.patience = policy.step_timeout
        self.share = policy.best_effort_share
        self.compose = COMPOSITIONS[policy.scheduling]
        self.cap = policy.batch_cap or placement.max_rows
        self.max_tokens = config.device.max_num_batched_tokens
        self.batches = 0
        self.kills: Counter[int] = Counter()  # of hung steps by degree, until steps of it are known to be done

    def ready(self, state: RequestState, degree: int) -> ReadyRow:
        """Kept until the row has stepped."""
        ready = state.ready
        if ready is None or ready.degree != degree:
            work = state.next_work(self.max_tokens)
            seconds = self.estimates.work_seconds(state, work, degree)
            ready = state.ready = ReadyRow(degree, work, Candidate(state.request.row, work.length, seconds))
        return ready

    def fitting(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, given in the order of service, that share one step."""
        return self.compose(candidates, self.max_tokens, self.cap)

    def shared(self, replica: InstanceState, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same where tenants share the step's time; `replica.credits` keeps the seconds that each may still use."""
        rides = [Ride(replica.residents[one.key].request.slo.tenant, one.seconds) for one in candidates]
        if len({ride.tenant for ride in rides}) == 1:
            replica.credits = {}
            return self.fitting(candidates)
        allowed = allowances(rides, replica.credits, self.estimates.pace(replica.degree).fixed)
        chosen = self.fitting([candidates[place] for place in riders(rides, allowed)])
        keys = {one.key for one in chosen}
        rode = [place for place, one in enumerate(candidates) if one.key in keys]
        replica.credits = left_over(rides, allowed, rode)
        return chosen

    def keeping(self, replica: InstanceState, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same on an instance with deadlines; `replica.saved` keeps the seconds left to best-effort rows."""
        chosen = self.fitting(candidates)
        with_deadline = sum(one.seconds for one in chosen if replica.residents[one.key].has_deadline)
        led = 0.0 if replica.residents[candidates[0].key].has_deadline else candidates[0].seconds
        replica.saved = after_step(
            replica.saved, self.share, self.estimates.pace(replica.degree).fixed + with_deadline, led
        )
        return chosen

    def begin(self, replica: InstanceState, candidates: Sequence[Candidate], now: float) -> Batch:
        """The next batch of the instance, of these rows, noted in the states of the rows and of the instance."""
        chosen = [replica.residents[candidate.key] for candidate in candidates]
        fixed = self.estimates.pace(replica.degree).fixed
        works = [self.ready(state, replica.degree).work for state in chosen]
        spans = [state.span(work) for state, work in zip(chosen, works, strict=True)]
        masks, refreshing = sum(state.masks for state in chosen), any(work.refresh for work in works)
        seconds = [candidate.seconds for candidate in candidates]
        replica.shares, replica.refreshing = shares(fixed, seconds), refreshing
        replica.features = batch_features(spans, masks)
        replica.added = dict(zip([candidate.key for candidate in candidates], seconds, strict=True))
        replica.ends_at = now + fixed + sum(seconds)
        self.batches += 1
        steps, longest, then = self.steps(replica, chosen), seconds, []
        if steps > 1:
            longest = [self.estimates.step_seconds(state, True, replica.degree) for state in chosen]
            ahead = self.ahead(candidates, longest, steps)
            then = [state.stages(span, ahead) for state, span in zip(chosen, spans, strict=True)]
        batch = Batch(self.batches, replica.instance.id, tuple(spans), steps, tuple(then), tuple(replica.copies))
        for state in chosen:  # last: an error before leaves rows as they are, and one in here what they count
            state.did(Transition.LAUNCHED)
        for state, work in zip(chosen, works, strict=True):
            state.launched(work, now)
        replica.in_flight, replica.batch, replica.spans, replica.copies = chosen, batch, spans, []
        replica.multi_step, replica.stops_early, replica.disturbed, replica.launched_at = False, False, False, now
        replica.overdue_at = math.ceil(now + self.limit(replica, (fixed + sum(longest)) * steps))
        return batch

    def limit(self, replica: InstanceState, predicted: float) -> float:
        """Seconds after which steps on the instance that should take so many count as hung."""
        known = self.estimates.pace(replica.degree).sure
        return step_limit(self.patience, predicted, known, self.kills[replica.degree])

    def hung(self, replica: InstanceState, now: float) -> None:
        """A step on the instance counts as hung; it is looked at again in case the instance does not go."""
        self.kills[replica.degree] += not replica.killed
        replica.killed = True
        replica.overdue_at = math.ceil(now + self.limit(replica, 0.0))

    def done(self, degree: int) -> None:
        """A step at this degree is done. Once step costs are known, earlier kills no longer extend the limit."""
        if self.kills and self.estimates.pace(degree).sure:
            del self.kills[degree]

    def steps(self, replica: InstanceState, chosen: Sequence[RequestState]) -> int:
        """How many steps the batch has at most: until a row changes how it steps, and one if a request waits."""
        if self.repeats == 1 or replica.degree > 1 or self.calls(replica, chosen):
            return 1
        return min(state.steady(self.repeats) for state in chosen)

    def ahead(self, candidates: Sequence[Candidate], refreshes: Sequence[float], steps: int) -> int:
        """Blocks that a row may begin in a launch after its present one.

        None if refreshing all rows that often would break a deadline. `refreshes`: seconds of a refresh, by row.
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

    def calls(self, replica: InstanceState, chosen: Sequence[RequestState]) -> bool:
        """Whether other requests wait, for a row or for a step, while the instance steps the chosen rows."""
        placement = self.placement
        return bool(placement.queue or placement.waiting or placement.moving or len(chosen) < len(replica.residents))

    def stop_early(self) -> Iterator[StopEarly]:
        """End batches of several steps early: a request waits, a row in them has ended, or the instance closes."""
        if self.repeats == 1:
            return
        for replicas in (self.placement.replicas, self.placement.closing):
            for replica in replicas.values():
                if (
                    replica.in_flight is None
                    or replica.batch is None
                    or replica.batch.steps == 1
                    or replica.stops_early
                ):
                    continue
                left = any(state.status is Status.LEAVING for state in replica.in_flight)
                if left or replicas is self.placement.closing or self.calls(replica, replica.in_flight):
                    replica.stops_early = True
                    yield StopEarly(replica.batch)

    def reported(self, replica: InstanceState, in_flight: Sequence[RequestState], results: Sequence[RowResult]) -> None:
        """Note what a step was that a batch took after its first, as the worker reports it.

        What the device did for a row that rested is part of the step and of none of the row's counts.
        """
        masks, seconds, refreshing = 0, [], False
        for place, (state, result) in enumerate(zip(in_flight, results, strict=True)):
            span = replica.spans[place] = stage(replica, place, result)
            refresh = refreshes(state, span) and not result.rested
            if state.status is Status.STEPPING and not result.rested:
                assert span.block_start == state.part.start
                exact = state.request.decoding.traits.exact
                state.took(refresh, state.part.block_start if exact else state.request.canvas_tokens)
            masks += result.unmasked + result.masks_left
            refreshing |= refresh
            seconds.append(self.estimates.step_seconds(state, refresh, replica.degree))
        replica.features, replica.refreshing = batch_features(replica.spans, masks), refreshing
        replica.shares = shares(self.estimates.pace(replica.degree).fixed, seconds)


def stage(replica: InstanceState, place: int, result: RowResult) -> Span:
    """The span that the row at this place of the batch has taken."""
    assert replica.batch is not None
    return replica.batch.then[place][result.stage - 1] if result.stage else replica.batch.spans[place]


def refreshes(state: RequestState, span: Span) -> bool:
    """Whether the step rewrites K/V of the row that later steps reuse."""
    return bool(span.grain) if state.request.decoding.traits.exact else span.length == span.keys


def shares(fixed: float, seconds: Sequence[float]) -> list[float]:
    """Of a step's time, by row: what each adds, and an even part of what every step takes."""
    total, even = fixed + sum(seconds), fixed / len(seconds)
    return [(even + one) / total for one in seconds]
