"""The state of one request: its life cycle, place on the canvas, instance, thresholds and cost."""

import math
from enum import IntEnum, auto
from typing import TYPE_CHECKING

import msgspec

from dilaserve.profile.forecast import Track
from dilaserve.scheduler.rules.composition import Candidate
from dilaserve.scheduler.rules.demand import load
from dilaserve.scheduler.rules.quotas import quotas as by_schedule
from dilaserve.scheduler.rules.step_kind import View, Work, work
from dilaserve.types import Load, Request, RowResult, Span, Usage

if TYPE_CHECKING:
    from dilaserve.scheduler.instance_state import InstanceState


class Status(IntEnum):
    WAITING = auto()  # in the queue, without K/V
    RESIDENT = auto()  # has K/V on an instance, between two steps
    STEPPING = auto()  # in a step in flight
    LEAVING = auto()  # ended while its last step is in flight
    GONE = auto()


class Transition(IntEnum):
    PLACED = auto()
    LAUNCHED = auto()
    RETURNED = auto()
    ENDED = auto()
    EVICTED = auto()


TRANSITIONS: dict[tuple[Status, Transition], Status] = {
    (Status.WAITING, Transition.PLACED): Status.RESIDENT,
    (Status.WAITING, Transition.ENDED): Status.GONE,
    (Status.RESIDENT, Transition.LAUNCHED): Status.STEPPING,
    (Status.RESIDENT, Transition.ENDED): Status.GONE,
    (Status.RESIDENT, Transition.EVICTED): Status.WAITING,
    (Status.STEPPING, Transition.RETURNED): Status.RESIDENT,
    (Status.STEPPING, Transition.ENDED): Status.LEAVING,
    (Status.STEPPING, Transition.EVICTED): Status.WAITING,
    (Status.LEAVING, Transition.RETURNED): Status.GONE,
    (Status.LEAVING, Transition.EVICTED): Status.GONE,
}


class Loads(msgspec.Struct):
    """What a request still needs, by its own levels, worked out when it is asked for.

    `refresh` and `reuse` are the seconds that such steps of the row take at `degree`, `due` the refreshes that it needs
    right now.
    """

    tracks: list[Track]
    masks: int
    due: float
    drift: float
    refresh: float
    reuse: float
    interval: int
    degree: int
    known: dict[int, Load] = {}

    def __getitem__(self, level: int) -> Load:
        found = self.known.get(level)
        if found is None:
            (law, after), masks = self.tracks[level], self.masks
            stays = 1.0 - law.ends[masks]
            steps = law.steps[masks] + stays * after.steps
            refreshes = self.due + stays * after.refreshes
            if self.interval:
                refreshes = max(refreshes, steps / self.interval)
            found = self.known[level] = load(steps, refreshes, self.drift, self.refresh, self.reuse)
        return found


class ReadyRow(msgspec.Struct, frozen=True, gc=False):
    """What a row would do in the next step of an instance of this degree, and how composition sees it there."""

    degree: int
    work: Work
    candidate: Candidate


class RequestState:
    """One request in the scheduler's memory. `kind` is what forecasts know it by.

    `thresholds` are those it may run at, its own first, and `drops` what they cost in accuracy, in points
    and on the safe side (`mean_drops`: expected); `yields` are the shares of its time that each saves for a point more
    than the one before; `level` counts in them, and so does `affordable_level`, the deepest that all requests may run
    at within the budget. `has_deadline` rows have a deadline that is being kept; `late` ones had one, and run on as
    best effort.
    """

    def __init__(
        self,
        request: Request,
        kind: str,
        thresholds: tuple[float, ...],
        drops: tuple[float, ...],
        means: tuple[float, ...],
        yields: tuple[float, ...],
        affordable_level: int,
    ) -> None:
        self.request, self.kind, self.thresholds = request, kind, thresholds
        self.drops, self.mean_drops, self.yields, self.affordable_level = drops, means, yields, affordable_level
        self.status = Status.WAITING
        self.replica: InstanceState | None = None
        self.deadline: float | None = None
        self.has_deadline = self.late = False
        self.seconds = 0.0  # that it takes alone, as was expected when it came
        self.wasted = False  # it has ended without use: its device time counts as wasted
        self.charged = False  # its tenant has paid a turn for its row
        self.suspect = False  # in flight when a worker died, and not stepped since
        self.level = 0
        self.table_threshold = request.decoding.confidence_threshold  # the threshold in the row's column
        self.loads: Loads | None = None  # None: not looked at since the last step
        self.ready: ReadyRow | None = None  # the same
        self.tracks: list[Track] = []  # by level, of the block in `tracked`
        self.tracked = (-1, -1)
        self.reserved = 0.0  # accuracy drop that the bank holds back for it
        self.observed = self.expected = 0.0  # steps, for the drift
        self.kv_start = 0
        self.block = self.block_step = 0
        self.prefix = request.prompt_tokens
        self.fresh = False
        self.since_refresh = 0
        self.steps = self.refreshes = self.unmasked = 0
        self.confidence = self.threshold_sum = self.device = 0.0
        self.deepest = 0  # level of a step so far; what is left for it is in doubt, so its drop is that of the answer
        self.started_at: float | None = None
        self.stepped_at = request.arrived_at  # end of the last step
        self.blocks = block_lengths(request)
        self.masks = self.blocks[0]
        self.block_start = request.prompt_tokens
        self.block_end = self.block_start + self.masks
        self.quotas: list[list[int]] = quotas(request, self.blocks)

    def did(self, what: Transition) -> None:
        self.status = TRANSITIONS[self.status, what]

    @property
    def threshold(self) -> float:
        return self.thresholds[self.level]

    def left(self, now: float) -> float:
        """Seconds until the deadline; infinite without one."""
        return math.inf if self.deadline is None else self.deadline - now

    def next_work(self) -> Work:
        decoding = self.request.decoding
        due = decoding.refresh_interval and self.since_refresh >= decoding.refresh_interval
        view = View(self.request.canvas_tokens, self.block_start, self.block_end, self.fresh and not due)
        return work(decoding.cache, view)

    def quota(self) -> int:
        shares = self.quotas[self.block]
        return shares[min(self.block_step, len(shares) - 1)]

    def span(self, todo: Work) -> Span:
        request = self.request
        return Span(
            request.row,
            request.generation,
            self.kv_start,
            todo.start,
            todo.length,
            request.canvas_tokens,
            self.block_start,
            self.block_end,
            self.quota() if self.quotas else 0,
            self.steps,
        )

    def stages(self, first: Span, blocks: int) -> tuple[Span, ...]:
        """What follows a step that has been launched, as `Batch.then` has it, up to so many blocks after this one."""
        cache, start = self.request.decoding.cache, self.block_start
        blocks = self.even_blocks(blocks) if self.quotas else blocks
        spans = []
        for block in range(self.block, min(self.block + 1 + blocks, len(self.blocks))):
            end = start + self.blocks[block]
            quota = self.quotas[block][0] if self.quotas and block > self.block else first.quota
            once, again = [work(cache, View(first.keys, start, end, fresh)) for fresh in (False, True)]
            for todo in (once,) if once.start == again.start else (once, again):
                place = dict(start=todo.start, length=todo.length, block_start=start, block_end=end)
                spans.append(first._replace(**place, quota=quota))
            start = end
        return tuple(spans[1:] if spans[0].start == first.start else spans[2:])

    def steady(self, most: int) -> int:
        """How many of its next steps may be of one launch, up to `most`, judged by the request alone."""
        decoding = self.request.decoding
        if decoding.refresh_interval or decoding.temperature:
            return 1
        if not self.quotas:
            return most
        shares = self.quotas[self.block][self.block_step :]
        alike = next((count for count, share in enumerate(shares) if share != shares[0]), len(shares))
        if alike == len(shares) and self.even_blocks(1):
            return most
        return min(most, alike) or 1

    def even_blocks(self, most: int) -> int:
        """How many blocks after its present one unmask as much in each of their steps, up to `most`."""
        later = self.quotas[self.block + 1 : self.block + 1 + most]
        return next((count for count, shares in enumerate(later) if len(set(shares)) > 1), len(later))

    def launched(self, todo: Work, now: float) -> None:
        self.did(Transition.LAUNCHED)
        if self.started_at is None:
            self.started_at = now
        self.took(todo.refresh)

    def took(self, refresh: bool) -> None:
        """Count a step that has begun, of a batch of several perhaps."""
        self.ready = None
        self.since_refresh = 1 if refresh else self.since_refresh + 1
        self.refreshes += refresh
        self.fresh = True

    def advance(self, result: RowResult) -> None:
        """Take in what a step did."""
        self.suspect = False
        self.steps += 1
        self.block_step += 1
        self.unmasked += result.unmasked
        self.confidence += result.confidence
        self.threshold_sum += self.table_threshold
        if self.level > self.deepest:
            self.deepest = self.level
        self.prefix, self.masks = result.prefix, result.masks_left
        self.loads = None
        if not result.masks_left and self.block_end < self.request.canvas_tokens:
            self.block += 1
            self.block_step = 0
            self.masks = self.blocks[self.block]
            self.block_start, self.block_end = self.block_end, self.block_end + self.masks
            self.fresh = False

    @property
    def drop(self) -> float:
        """Accuracy drop in points so far, on the safe side."""
        return self.drops[self.deepest] if self.steps else 0.0

    def usage(self, now: float) -> Usage:
        request = self.request
        started_at = now if self.started_at is None else self.started_at
        ruled = request.decoding.rule == "threshold" and self.steps > 0
        return Usage(
            steps=self.steps,
            refreshes=self.refreshes,
            queued=started_at - request.arrived_at,
            served=now - started_at,
            mean_confidence=self.confidence / self.unmasked if self.unmasked else None,
            deadline=None if self.deadline is None else self.deadline - request.arrived_at,
            deadline_met=None if self.deadline is None else now <= self.deadline,
            min_threshold=self.thresholds[self.deepest] if ruled else None,
            mean_threshold=self.threshold_sum / self.steps if ruled else None,
            expected_accuracy_drop=self.mean_drops[self.deepest] if self.steps else 0.0,
            device=self.device,
        )


def quotas(request: Request, lengths: list[int]) -> list[list[int]]:
    """Tokens to unmask by block and step under the steps rule; empty for the others."""
    decoding = request.decoding
    if decoding.rule != "steps":
        return []
    return by_schedule(decoding.schedule, decoding.num_denoising_steps, lengths)


def block_lengths(request: Request) -> list[int]:
    total, block = request.canvas_tokens - request.prompt_tokens, request.decoding.block_length
    return [min(block, total - start) for start in range(0, total, block)]
