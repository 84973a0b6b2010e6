"""The state machine between events and commands. It remembers; it has no clock, no device and never waits."""

from collections import deque
from collections.abc import Iterator
from enum import Enum, auto

from dilaserve.config import Config
from dilaserve.pages import PagePool
from dilaserve.policy.admission import Room, least_loaded
from dilaserve.policy.caching import View, Work, work
from dilaserve.policy.composition import COMPOSITIONS, Candidate
from dilaserve.policy.transfer import even, steps_per_block
from dilaserve.terms import (
    Arrival,
    Batch,
    Cancel,
    Command,
    Emit,
    Event,
    Fail,
    Finish,
    FinishReason,
    Instance,
    InstanceLost,
    InstanceReady,
    Launch,
    Release,
    Request,
    RowResult,
    Span,
    StepDone,
    Usage,
)

MAX_CRASHES = 2  # a row in flight at so many lost instances fails alone


class State(Enum):
    WAITING = auto()  # in the queue, without K/V
    RESIDENT = auto()  # has K/V on an instance, between two steps
    STEPPING = auto()  # in a step in flight
    LEAVING = auto()  # ended while its last step is in flight
    GONE = auto()


class Did(Enum):
    PLACED = auto()
    LAUNCHED = auto()
    RETURNED = auto()
    ENDED = auto()
    EVICTED = auto()


TRANSITIONS: dict[tuple[State, Did], State] = {
    (State.WAITING, Did.PLACED): State.RESIDENT,
    (State.WAITING, Did.ENDED): State.GONE,
    (State.RESIDENT, Did.LAUNCHED): State.STEPPING,
    (State.RESIDENT, Did.ENDED): State.GONE,
    (State.RESIDENT, Did.EVICTED): State.WAITING,
    (State.STEPPING, Did.RETURNED): State.RESIDENT,
    (State.STEPPING, Did.ENDED): State.LEAVING,
    (State.STEPPING, Did.EVICTED): State.WAITING,
    (State.LEAVING, Did.RETURNED): State.GONE,
    (State.LEAVING, Did.EVICTED): State.GONE,
}


class Progress:
    """How far one request has come."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = State.WAITING
        self.seat: Seat | None = None
        self.kv_start = 0
        self.block = 0
        self.block_step = 0
        self.prefix = request.prompt_tokens
        self.fresh = False
        self.since_refresh = 0
        self.steps = self.refreshes = self.unmasked = self.crashes = 0
        self.confidence = 0.0
        self.started_at: float | None = None
        self.quotas: list[list[int]] = quotas(request)

    def did(self, what: Did) -> None:
        self.state = TRANSITIONS[self.state, what]

    @property
    def block_start(self) -> int:
        return self.request.prompt_tokens + self.block * self.request.decoding.block_length

    @property
    def block_end(self) -> int:
        return min(self.block_start + self.request.decoding.block_length, self.request.canvas_tokens)

    def next_work(self) -> Work:
        decoding = self.request.decoding
        due = decoding.refresh_interval and self.since_refresh >= decoding.refresh_interval
        view = View(self.request.canvas_tokens, self.block_start, self.block_end, self.fresh and not due)
        return work(decoding.cache, view)

    def quota(self) -> int:
        if not self.quotas:
            return 0
        shares = self.quotas[self.block]
        return shares[min(self.block_step, len(shares) - 1)]

    def span(self, todo: Work) -> Span:
        request = self.request
        return Span(
            row=request.row,
            generation=request.generation,
            kv_start=self.kv_start,
            start=todo.start,
            length=todo.length,
            keys=request.canvas_tokens,
            block_start=self.block_start,
            block_end=self.block_end,
            quota=self.quota(),
            step=self.steps,
        )

    def launched(self, todo: Work, now: float) -> None:
        self.did(Did.LAUNCHED)
        if self.started_at is None:
            self.started_at = now
        self.since_refresh = 1 if todo.refresh else self.since_refresh + 1
        self.refreshes += todo.refresh
        self.fresh = True

    def advance(self, result: RowResult) -> None:
        self.steps += 1
        self.block_step += 1
        self.unmasked += result.unmasked
        self.confidence += result.confidence
        self.prefix = result.prefix
        if not result.masks_left and self.block_end < self.request.canvas_tokens:
            self.block += 1
            self.block_step = 0
            self.fresh = False

    def usage(self, now: float) -> Usage:
        started_at = now if self.started_at is None else self.started_at
        return Usage(
            steps=self.steps,
            refreshes=self.refreshes,
            queued=started_at - self.request.arrived_at,
            served=now - started_at,
            mean_confidence=self.confidence / self.unmasked if self.unmasked else None,
        )


class Seat:
    """One instance, who sits on it, and the batch it works on."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.pages = PagePool(instance.kv_tokens)
        self.residents: dict[int, Progress] = {}
        self.flying: list[Progress] | None = None
        self.batch = -1


class Scheduler:
    """Turns events into commands: `observe` takes one event, `decide` fills idle instances.

    The same events at the same times give the same commands.
    """

    def __init__(self, config: Config) -> None:
        self.compose = COMPOSITIONS[config.scheduler.scheduling]
        self.max_rows = config.device.max_num_seqs
        self.max_tokens = config.device.max_num_batched_tokens
        self.waiting: deque[Progress] = deque()
        self.requests: dict[str, Progress] = {}
        self.seats: dict[int, Seat] = {}
        self.batches = 0

    def observe(self, event: Event, now: float) -> Iterator[Command]:
        match event:
            case Arrival(request):
                progress = self.requests[request.id] = Progress(request)
                self.waiting.append(progress)
            case Cancel(id, reason):
                if known := self.requests.get(id):  # it may have ended while the event was on its way
                    yield from self.end(known, reason, now)
            case StepDone():
                yield from self.step_done(event, now)
            case InstanceReady(instance):
                self.seats[instance.id] = Seat(instance)
            case InstanceLost(instance, reason):
                if seat := self.seats.pop(instance, None):
                    yield from self.evict(seat, reason)

    def decide(self, now: float) -> Iterator[Command]:
        self.place()
        for seat in self.seats.values():
            if seat.flying is None and seat.residents:
                yield self.launch(seat, now)

    # events

    def step_done(self, event: StepDone, now: float) -> Iterator[Command]:
        seat = self.seats.get(event.instance)
        if seat is None or seat.batch != event.batch or seat.flying is None:
            return  # the instance was lost after it had sent this
        flying, seat.flying = seat.flying, None
        for progress, result in zip(flying, event.results, strict=True):
            leaving = progress.state is State.LEAVING
            progress.did(Did.RETURNED)
            if leaving:
                yield self.release(progress)
            else:
                yield from self.returned(progress, result, now)

    def returned(self, progress: Progress, result: RowResult, now: float) -> Iterator[Command]:
        """A row is back from a step: emit what is final, end it if that is all."""
        request, before = progress.request, progress.prefix
        progress.advance(result)
        end = request.prompt_tokens + request.max_tokens
        stopped = 0 <= result.stop_at < result.prefix and not request.ignore_eos
        prefix = min(result.stop_at if stopped else result.prefix, end)
        if prefix > before:
            yield Emit(request, prefix)
        if stopped and result.stop_at < end:
            yield from self.end(progress, "stop", now)
        elif result.prefix >= end:
            yield from self.end(progress, "length", now)

    def end(self, progress: Progress, reason: FinishReason, now: float) -> Iterator[Command]:
        del self.requests[progress.request.id]
        if progress.state is State.WAITING:
            self.waiting.remove(progress)
        progress.did(Did.ENDED)
        yield Finish(progress.request, reason, progress.usage(now))
        if progress.state is State.GONE:
            yield self.release(progress)

    def release(self, progress: Progress) -> Release:
        """Give back the row's seat, if it has one, and the row."""
        if progress.seat:
            self.unseat(progress, progress.seat)
        return Release(progress.request.row)

    def unseat(self, progress: Progress, seat: Seat) -> None:
        del seat.residents[progress.request.row]
        seat.pages.give(progress.kv_start)
        progress.seat, progress.fresh = None, False

    def evict(self, seat: Seat, reason: str) -> Iterator[Command]:
        """The instance is lost: its rows wait again, ahead of the others; they keep all committed tokens."""
        back: list[Progress] = []
        for progress in list(seat.residents.values()):
            state = progress.state
            progress.crashes += state is State.STEPPING
            self.unseat(progress, seat)
            if state is State.STEPPING and progress.crashes >= MAX_CRASHES:
                del self.requests[progress.request.id]
                yield Fail(progress.request, f"in flight at {progress.crashes} lost workers, the last: {reason}")
                yield Release(progress.request.row)
                continue
            progress.did(Did.EVICTED)
            if state is State.LEAVING:
                yield Release(progress.request.row)
            else:
                back.append(progress)
        self.waiting.extendleft(sorted(back, key=lambda progress: -progress.request.arrived_at))

    # decisions

    def place(self) -> None:
        """Seat waiting requests in order of arrival, until one finds no room."""
        while self.waiting and (seat := self.seat_for(self.waiting[0])):
            progress = self.waiting.popleft()
            progress.did(Did.PLACED)
            progress.seat = seat
            seat.residents[progress.request.row] = progress

    def seat_for(self, progress: Progress) -> Seat | None:
        rooms = [Room(seat.instance.id, len(seat.residents), self.max_rows) for seat in self.seats.values()]
        for id in least_loaded(rooms):
            kv_start = self.seats[id].pages.take(progress.request.canvas_tokens)
            if kv_start is not None:
                progress.kv_start = kv_start
                return self.seats[id]
        return None

    def launch(self, seat: Seat, now: float) -> Launch:
        todo = {row: progress.next_work() for row, progress in seat.residents.items()}
        candidates = [
            Candidate(row, progress.request.arrived_at, todo[row].length) for row, progress in seat.residents.items()
        ]
        chosen = [seat.residents[row] for row in self.compose(candidates, self.max_tokens)]
        chosen.sort(key=lambda progress: (todo[progress.request.row].length, progress.request.canvas_tokens))
        spans = tuple(progress.span(todo[progress.request.row]) for progress in chosen)
        for progress in chosen:
            progress.launched(todo[progress.request.row], now)
        self.batches += 1
        seat.flying, seat.batch = chosen, self.batches
        return Launch(Batch(self.batches, seat.instance.id, spans))


def quotas(request: Request) -> list[list[int]]:
    """Tokens to unmask by block and step under the steps rule; empty for the others."""
    decoding = request.decoding
    if decoding.rule != "steps":
        return []
    lengths = block_lengths(request)
    steps = steps_per_block(decoding.num_denoising_steps, len(lengths))
    return [even(length, share) for length, share in zip(lengths, steps, strict=True)]


def block_lengths(request: Request) -> list[int]:
    total, block = request.canvas_tokens - request.prompt_tokens, request.decoding.block_length
    return [min(block, total - start) for start in range(0, total, block)]
