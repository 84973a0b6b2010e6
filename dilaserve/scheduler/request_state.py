"""The state of one request: its life cycle, place on the canvas, instance, thresholds and cost."""

import math
from enum import IntEnum, auto
from typing import TYPE_CHECKING

import msgspec

from dilaserve.profile.forecast import Track
from dilaserve.scheduler.rules.blocks import Part, first_open, parts
from dilaserve.scheduler.rules.composition import Candidate
from dilaserve.scheduler.rules.demand import load
from dilaserve.scheduler.rules.quotas import BlockMasks, quotas
from dilaserve.scheduler.rules.step_kind import View, Work, work
from dilaserve.types import PAGE, Load, Request, RowResult, Span, TimedStep, Usage

if TYPE_CHECKING:
    from dilaserve.scheduler.instance_state import InstanceState

GROWTH = 4 * PAGE  # tokens of K/V that a growing row takes beyond its block, so that it seldom has to grow

MAX_CHECKS = 16  # steps in which tokens of a block without masks may still be replaced (LLaDA2.1's max_post_steps)


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
    right now, `first` the seconds that its next step takes beyond `refresh`. `firsts`: steps for the first token alone,
    of the present block and of each later one.
    """

    tracks: list[Track]
    masks: int
    due: float
    drift: float
    refresh: float
    reuse: float
    interval: int
    degree: int
    first: float = 0.0
    firsts: tuple[int, int] = (0, 0)
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
            now, later = self.firsts
            steps += (now + later * stays * after.refreshes) / self.drift  # their number is sure
            found = load(steps, refreshes, self.drift, self.refresh, self.reuse)
            if self.first:
                found = Load(found.steps, found.work + self.first)
            self.known[level] = found
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
        self.prefix_hashes = request.prefix_hashes  # and those of what has become final since
        self.parts = parts(request)
        self.blocks = self.parts[-1].block + 1
        self.takes_first = any(part.first for part in self.parts)
        self.place = first_open(self.parts, request.begin)  # in `parts`
        self.part_step = 0  # steps of that part so far
        self.prefix = request.begin
        self.cached = 0  # tokens from the canvas's start whose K/V may be reused
        self.cached_prompt_tokens = 0  # the part of them that came from another request
        self.room = 0  # tokens of its run in the pool
        self.block_steps = 0  # steps that the block had which was finished last
        self.checks = 0  # steps of the block that began without a mask, where tokens may be replaced
        self.in_chunk = False  # its step in flight unmasks nothing
        self.timeline: list[TimedStep] = []  # its last steps, for those who look at running requests
        self.refreshed = False  # its last step has rewritten K/V that are kept
        self.since_refresh = 0
        self.steps = self.refreshes = self.unmasked = self.restarts = 0
        self.confidence = self.threshold_sum = self.device = self.stepping = 0.0
        self.deepest = 0  # level of a step so far; what is left for it is in doubt, so its drop is that of the answer
        self.started_at: float | None = None
        self.stepped_at = request.arrived_at  # end of the last step
        self.masks = self.part.masks
        self.quotas = quotas_of(request, self.parts)

    def did(self, what: Transition) -> None:
        self.status = TRANSITIONS[self.status, what]
        if what is Transition.EVICTED and self.started_at is not None:
            self.restarts += 1

    @property
    def part(self) -> Part:
        """What is unmasked now."""
        return self.parts[self.place]

    @property
    def block(self) -> int:
        return self.parts[self.place].block

    @property
    def block_masks(self) -> int:
        """Masks left in the whole block."""
        return self.masks + self.parts[self.place].block_end - self.parts[self.place].end

    @property
    def fresh(self) -> bool:
        """Whether the next step may reuse K/V and rewrites none that are kept."""
        decoding = self.request.decoding
        return self.cached >= (self.part.block_start if decoding.traits.exact else self.request.canvas_tokens)

    @property
    def threshold(self) -> float:
        return self.thresholds[self.level]

    @property
    def by_threshold(self) -> bool:
        """Whether its decode rule goes by a threshold."""
        return self.request.decoding.rule in ("threshold", "dynamic")

    def left(self, now: float) -> float:
        """Seconds until the deadline; infinite without one."""
        return math.inf if self.deadline is None else self.deadline - now

    def next_work(self, limit: int) -> Work:
        """What its next step computes; of what lies before the active block no more than `limit` tokens at once."""
        decoding = self.request.decoding
        due = decoding.refresh_interval and self.since_refresh >= decoding.refresh_interval
        return self.work(self.part, 0 if due else self.cached, limit)

    def work(self, part: Part, cached: int, limit: int = 2**31) -> Work:
        """What a step of this part computes."""
        decoding = self.request.decoding
        view = View(self.request.canvas_tokens, part.block_start, part.block_end, cached, part.first, limit)
        return work(decoding.cache, view, decoding.traits, decoding.block_length)

    def quota(self) -> int:
        shares = self.quotas[self.place]
        return shares[min(self.part_step, len(shares) - 1)]

    def span(self, todo: Work) -> Span:
        quota = self.quota() if self.quotas else 0
        return self.span_of(self.part, todo, quota)

    def span_of(self, part: Part, todo: Work, quota: int) -> Span:
        request, end = self.request, part.start if todo.chunk else part.end
        return Span(
            request.row,
            request.generation,
            self.kv_start,
            todo.start,
            todo.length,
            todo.keys,
            part.start,
            end,
            quota,
            self.part_step,
            todo.grain,
            todo.origin,
            1 if part.first else request.decoding.traits.logit_shift,
        )

    def stages(self, first: Span, parts: int) -> tuple[Span, ...]:
        """What follows a step that has been launched, as `Batch.then` has it, up to so many parts after this one."""
        exact, cached = self.request.decoding.traits.exact, self.cached
        parts = self.even_parts(parts) if self.quotas else parts
        spans: list[Span] = []
        for place in range(self.place, min(self.place + 1 + parts, len(self.parts))):
            part = self.parts[place]
            if part.block_end > self.room:
                break
            if place > self.place and part.block_start == part.start and not exact:
                cached = 0
            quota = self.quotas[place][0] if self.quotas and place > self.place else first.quota
            for _ in range(2):
                todo = self.work(part, cached)
                span, cached = self.span_of(part, todo, quota), todo.cached
                if not spans or span != spans[-1]:
                    spans.append(span)
        return tuple(spans[1:])

    def steady(self, most: int) -> int:
        """How many of its next steps may be of one launch, up to `most`, judged by the request alone."""
        decoding = self.request.decoding
        if (
            decoding.traits.noise_steps
            or decoding.refresh_interval
            or decoding.temperature
            or decoding.editing_threshold is not None
        ):
            return 1
        if self.ready and self.ready.work.chunk:
            return 1
        if not self.quotas:
            return most
        shares = self.quotas[self.place][self.part_step :]
        alike = next((count for count, share in enumerate(shares) if share != shares[0]), len(shares))
        if alike == len(shares) and self.even_parts(1):
            return most
        return min(most, alike) or 1

    def even_parts(self, most: int) -> int:
        """How many parts after its present one unmask as much in each of their steps, up to `most`."""
        later = self.quotas[self.place + 1 : self.place + 1 + most]
        return next((count for count, shares in enumerate(later) if len(set(shares)) > 1), len(later))

    def launched(self, todo: Work, now: float) -> None:
        """Count the step that has begun."""
        if self.started_at is None:
            self.started_at = now
        self.in_chunk = todo.chunk
        self.took(todo.refresh, todo.cached)

    def took(self, refresh: bool, cached: int) -> None:
        """Count a step that has begun, of a batch of several perhaps; `cached`: see `Work`."""
        self.ready, self.refreshed = None, refresh
        self.since_refresh = 1 if refresh else self.since_refresh + 1
        self.refreshes += refresh
        self.cached = cached

    def did_chunk(self) -> None:
        """Take in a step that unmasked nothing: K/V of a part of what lies before the block are there."""
        self.suspect = self.in_chunk = False
        self.loads = None

    @property
    def kv_tokens(self) -> int:
        """Tokens for which the row wants K/V memory: its canvas, or where it grows what is needed soon."""
        canvas = self.request.canvas_tokens
        return min(canvas, self.part.block_end + GROWTH) if self.grows else canvas

    @property
    def grows(self) -> bool:
        """Whether K/V memory is taken block by block."""
        return self.request.decoding.traits.exact

    @property
    def wants_more(self) -> bool:
        """Whether the row's run does not hold its whole canvas yet."""
        return self.room < self.request.canvas_tokens

    def advance(self, result: RowResult) -> RowResult:
        """Take in what a step did; returns it without what may still be replaced."""
        self.suspect = False
        self.steps += 1
        self.part_step += 1
        self.block_steps = self.part_step
        self.unmasked += result.unmasked
        self.confidence += result.confidence
        self.threshold_sum += self.table_threshold
        if self.level > self.deepest:
            self.deepest = self.level
        masks, self.masks = self.masks, result.masks_left
        self.loads = None
        done = self.is_done(masks, result)
        if not done and self.request.decoding.editing_threshold is not None:
            result = msgspec.structs.replace(result, prefix=self.part.start, stop_at=-1)
        if done and self.place + 1 < len(self.parts):
            self.next_part()
        return result

    def is_done(self, masks: int, result: RowResult) -> bool:
        """Whether the part is done after a step that it began with so many masks."""
        if result.masks_left or self.request.decoding.editing_threshold is None:
            return not result.masks_left
        self.checks += not masks
        return not masks and (not result.edited or self.checks == MAX_CHECKS)

    def next_part(self) -> None:
        before = self.part
        self.place += 1
        self.checks = 0
        self.part_step, self.masks = 0, self.part.masks
        if self.part.block != before.block and not self.request.decoding.traits.exact:
            self.cached = 0  # K/V are good enough for one block

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
            cached_prompt_tokens=self.cached_prompt_tokens,
            alone=self.seconds,
            stepping=self.stepping,
            restarts=self.restarts,
            resumed_tokens=request.resumed_tokens,
        )


def quotas_of(request: Request, parts: list[Part]) -> list[list[int]]:
    """Tokens to unmask by part and step under the rules that count; empty for the others."""
    if not request.decoding.num_denoising_steps or request.decoding.traits.noise_steps:
        return []
    blocks: dict[int, BlockMasks] = {}
    for part in parts:
        block = BlockMasks(part.block_end - part.block_start, [], part.first)
        blocks.setdefault(part.block, block).masks.append(part.masks)
    return quotas(request.decoding, list(blocks.values()))
