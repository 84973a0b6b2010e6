"""Measure seconds of a step by what it computes, on the real executor: reuse, refresh and mixed batches."""

import asyncio
import itertools
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from dilaserve.calibrate.kept import MeasuredStep, Measurements
from dilaserve.calibrate.progress import Seen, quiet
from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, Parts, real
from dilaserve.errors import Unavailable
from dilaserve.executor.executor import Executor
from dilaserve.profile.step_cost import Features, Sample
from dilaserve.scheduler.estimates import batch_features
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import (
    PAGE,
    Batch,
    Decoding,
    Event,
    FamilyTraits,
    Instance,
    InstanceReady,
    Moves,
    Span,
    StepDone,
    WorkerLost,
    WorkerUp,
)

BLOCK = 32  # tokens of the block that measured rows work on, where the model was not trained with another
REUSE_ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 16, 21, 24, 32, 48, 64)  # some of which a GPU pads
REFRESH_ROWS = (1, 2, 3, 4, 8)
ROUNDS, REPEATS = 3, 2
E = TypeVar("E", bound=Event)


class Rig(NamedTuple):
    """The first instance of an executor, with a table whose rows are all laid out."""

    executor: Executor
    table: RequestTable
    kv_tokens: int
    inbox: "asyncio.Queue[Event]"


async def step_costs(
    config: Config, limit: int, seen: Seen, kept: Measurements, assemble: Assemble = real
) -> dict[int, list[Sample]]:
    """Seconds of reuse, refresh and mixed steps by tensor-parallel degree, on the first devices; the median of several
    each. Those that are `kept` are not measured again.
    """
    parts = await asyncio.to_thread(assemble, config, quiet)
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    inbox: asyncio.Queue[Event] = asyncio.Queue()
    running = asyncio.create_task(parts.executor.run(inbox.put_nowait, started))
    try:
        await asyncio.wait([running, started], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        await started
        pool = min([event.kv_tokens for event in drained(inbox) if isinstance(event, WorkerUp)])
        found: dict[int, list[Sample]] = {}
        for degree in parts.degrees:
            instance = Instance(degree, tuple(range(degree)), pool // PAGE * PAGE * degree)
            parts.executor.reshard(Moves(tuple(found), (instance,)))
            await until(inbox, InstanceReady)
            rig = Rig(parts.executor, parts.table, instance.kv_tokens, inbox)
            found[degree] = await measured(rig, parts, degree, config, limit, seen, kept)
        return found
    finally:
        running.cancel()
        await asyncio.wait([running])


async def measured(
    rig: Rig, parts: Parts, instance: int, config: Config, limit: int, seen: Seen, kept: Measurements
) -> list[Sample]:
    """Every kind of step in several rounds, each time beside one that is always the same: machines that others use too
    change their speed within seconds, and each is measured relative to that one.
    """
    traits, device = parts.model.traits, config.device
    block = traits.block_length or BLOCK
    every = layouts(device.max_num_seqs, device.max_num_batched_tokens, rig.kv_tokens, limit, block, traits.exact)
    plan = {described(rows): rows for rows in every}
    rng, numbers = random.Random(0), itertools.count(1)

    async def run(rows: list[Shape], times: int, unseen: int = 0) -> tuple[Features, float]:
        """What the steps are and take, the median of so many after those `unseen`."""
        spans = laid_out(rig.table, rows, parts.mask_id, rng, parts.vocab_size, traits)
        seconds = []
        for _ in range(unseen + times):
            for span in spans:
                rig.table.canvas[span.row, span.block_start : span.block_end] = parts.mask_id
            rig.executor.launch(Batch(next(numbers), instance, spans))
            seconds.append((await until(rig.inbox, StepDone)).seconds)
        masks = sum(span.block_end - span.block_start for span in spans)
        return batch_features(spans, masks), statistics.median(seconds[unseen:])

    yardstick = sorted(plan, key=lambda layout: packed(plan[layout]))[len(plan) // 4]
    keys = [(instance, yardstick, layout, turn) for turn, layout in in_rounds(list(plan), rng)]
    missing = [key for key in keys if key not in kept.steps]
    before = (await run(plan[yardstick], 1))[1] if missing else 0.0
    for place, key in enumerate(missing, len(keys) - len(missing) + 1):
        features, seconds = await run(plan[key[2]], REPEATS, 1)
        after = (await run(plan[yardstick], 1))[1]
        kept.add(MeasuredStep(*key, features, seconds / statistics.fmean((before, after)), after))
        seen("step costs", place, len(keys))
        before = after
    return samples([kept.steps[key] for key in keys])


def in_rounds(layouts: list[str], rng: random.Random) -> Iterator[tuple[int, str]]:
    """The order in which layouts are measured: each once a round."""
    for turn in range(ROUNDS):
        yield from ((turn, layout) for layout in rng.sample(layouts, len(layouts)))


def samples(steps: Sequence[MeasuredStep]) -> list[Sample]:
    """One sample for each kind of step, the median of its rounds."""
    unit = statistics.median(step.usual for step in steps)
    kinds: dict[str, list[MeasuredStep]] = {}
    for step in steps:
        kinds.setdefault(step.layout, []).append(step)
    return [Sample(own[0].features, unit * statistics.median(one.ratio for one in own)) for own in kinds.values()]


def drained(inbox: "asyncio.Queue[Event]") -> Iterator[Event]:
    while not inbox.empty():
        yield inbox.get_nowait()


async def until(inbox: "asyncio.Queue[Event]", kind: type[E]) -> E:
    """The next event of this kind."""
    while True:
        event = await inbox.get()
        if isinstance(event, kind):
            return event
        if isinstance(event, WorkerLost):
            raise Unavailable(f"a worker was lost while its steps were measured: {event.reason}")


class Shape(NamedTuple):
    """A row whose last `block` tokens are masked and whose last `queries` tokens are computed."""

    canvas: int
    queries: int
    block: int


def described(rows: Sequence[Shape]) -> str:
    """A layout in short, as 3x256/32/32: rows, canvas, queries and block."""
    parts = [(shape, len(list(group))) for shape, group in itertools.groupby(rows)]
    return " ".join(f"{count}x{shape.canvas}/{shape.queries}/{shape.block}" for shape, count in parts)


def layouts(
    rows: int, tokens: int, pool: int, limit: int, block: int = BLOCK, exact: bool = False
) -> Iterator[list[Shape]]:
    """Batches to measure that fit the limits of the server: reuse only, refresh only and mixed; with `exact` K/V, steps
    of prompts instead of refreshes, and those that take in a finished block and begin the next.
    """
    lengths = [length for length in (64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096) if length <= limit] or [limit]
    for batch in every_layout(lengths, block, exact):
        pages = sum(-(-shape.canvas // PAGE) * PAGE for shape in batch)
        if len(batch) <= rows and packed(batch) <= tokens and pages <= pool:
            yield batch


def packed(batch: Sequence[Shape]) -> int:
    """Tokens of a step."""
    return sum(shape.queries for shape in batch)


def every_layout(lengths: Sequence[int], block: int, exact: bool) -> Iterator[list[Shape]]:
    for queries in (block, 2 * block) if exact else (block,):
        for count in REUSE_ROWS:
            for length in lengths[1::2]:
                yield [Shape(length, min(queries, length), block)] * count
    for count in REFRESH_ROWS:
        for length in lengths:
            yield [Shape(length, length, block)] * count
    for fresh in (1, 2, 3):
        for count in (1, 3, 6, 12):
            for length in lengths[::2]:
                yield [Shape(length, length, block)] * fresh + [Shape(length, min(block, length), block)] * count


def laid_out(
    table: RequestTable, rows: list[Shape], mask_id: int, rng: random.Random, vocab: int, traits: FamilyTraits
) -> tuple[Span, ...]:
    """Fill rows of the table with random canvases whose last block is masked."""
    spans, kv_start = [], 0
    for row, (canvas, queries, block) in enumerate(rows):
        prompt = max(1, canvas - block)
        ids = np.array([rng.randrange(min(vocab, 250)) for _ in range(prompt)], dtype=np.int32)
        generation = table.fill(row, ids, canvas, mask_id, Decoding())
        start = min(canvas - queries, prompt)
        grain = (1 if traits.attention == "causal" else block) if traits.exact and start < prompt else 0
        seen = (grain, prompt if grain else 0)
        spans.append(Span(row, generation, kv_start, start, canvas - start, canvas, prompt, canvas, 0, 0, *seen))
        kv_start += -(-canvas // PAGE) * PAGE
    return tuple(spans)
