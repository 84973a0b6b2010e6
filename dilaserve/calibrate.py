"""Measure a model on this machine: seconds of a step by what it computes, steps and accuracy by threshold and task.

Both on the real executor. The result is one profile file, which the server then loads by itself, and two plots.
"""

import asyncio
import datetime
import itertools
import math
import platform
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, Parts, real
from dilaserve.engine.engine import Engine
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, ConfigError, Unavailable
from dilaserve.executor.worker_processes import Executor, Progress
from dilaserve.profile import problems, profile_file
from dilaserve.profile.decode_speed import (
    ANY,
    BINS,
    LEVELS,
    PARTS,
    Forecast,
    Law,
    Laws,
    QualityProfile,
    TaskProfile,
    isotonic,
    kind_of,
    parted,
    summed,
)
from dilaserve.profile.problems import TASKS, held_out
from dilaserve.profile.problems.problem import Problem
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.profile.step_cost import Features, Sample, StepCost, fit
from dilaserve.scheduler.estimates import batch_features
from dilaserve.transport.devices import listed
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import (
    PAGE,
    Batch,
    Decoding,
    Event,
    Instance,
    InstanceReady,
    Moves,
    Span,
    StepDone,
    WorkerLost,
    WorkerUp,
)

ANSWER = 32  # tokens of the block that measured rows work on
REUSE_ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 16, 21, 24, 32, 48, 64)  # some of which a GPU pads
REFRESH_ROWS = (1, 2, 3, 4, 8)
ROUNDS, REPEATS = 3, 2
SIDE = 1.282  # normal quantile of a one-sided 90 % bound
CHATTER = 16  # requests at once while quality is measured
FINEST = 64  # kinds of prompts by length that a task is measured by
KINDS, FEWEST = 8, 50  # kinds that it is split into, at most, and the problems of one, at least
TELLING = 0.1  # share of the variance of the steps that these kinds must explain, else the task is not split
GAIN = 0.01  # share that a further kind must explain
E = TypeVar("E", bound=Event)
Seen = Callable[[str, int, int], None]  # what is measured, done, total
Counts = dict[tuple[str, int, int], list[list[float]]]  # of steps, by kind of request, level and part of the canvas


class Question(msgspec.Struct, frozen=True):
    """One line of a JSONL file; without an answer, agreement with the model's own reference answer counts."""

    prompt: str
    answer: str | None = None
    task: str = "prompts"


class Answer(NamedTuple):
    right: bool
    steps: int


# step costs


class Rig(NamedTuple):
    """The first instance of an executor, with a table whose rows are all laid out."""

    executor: Executor
    table: RequestTable
    kv_tokens: int
    inbox: "asyncio.Queue[Event]"


async def step_costs(config: Config, limit: int, seen: Seen, assemble: Assemble = real) -> dict[int, list[Sample]]:
    """Seconds of reuse, refresh and mixed steps by tensor-parallel degree, on the first devices; the median of several
    each.
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
            found[degree] = await measured(rig, parts, degree, config, limit, seen)
        return found
    finally:
        running.cancel()
        await asyncio.wait([running])


async def measured(rig: Rig, parts: Parts, instance: int, config: Config, limit: int, seen: Seen) -> list[Sample]:
    """Every kind of step in several rounds, each time beside one that is always the same: machines that others use too
    change their speed within seconds, and what a kind takes is told against what that one usually takes.
    """
    plan = list(layouts(config.device.max_num_seqs, config.device.max_num_batched_tokens, rig.kv_tokens, limit))
    rng, numbers = random.Random(0), itertools.count(1)

    async def run(rows: list[Shape], times: int, unseen: int = 0) -> tuple[Features, float]:
        """What the steps are and take, the median of so many after those `unseen`."""
        spans = laid_out(rig.table, rows, parts.mask_id, rng, parts.vocab_size)
        seconds = []
        for _ in range(unseen + times):
            for span in spans:
                rig.table.canvas[span.row, span.block_start : span.block_end] = parts.mask_id
            rig.executor.launch(Batch(next(numbers), instance, spans))
            seconds.append((await until(rig.inbox, StepDone)).seconds)
        masks = sum(span.block_end - span.block_start for span in spans)
        return batch_features(spans, masks), statistics.median(seconds[unseen:])

    yardstick = sorted(plan, key=packed)[len(plan) // 4]
    rng.shuffle(plan)
    kinds: dict[int, Features] = {}
    ratios: list[list[float]] = [[] for _ in plan]
    usual = [(await run(yardstick, 1))[1]]
    for turn in range(ROUNDS):
        for count, kind in enumerate(rng.sample(range(len(plan)), len(plan))):
            kinds[kind], seconds = await run(plan[kind], REPEATS, 1)
            usual.append((await run(yardstick, 1))[1])
            ratios[kind].append(seconds / statistics.fmean(usual[-2:]))
            seen("step costs", turn * len(plan) + count + 1, ROUNDS * len(plan))
    unit = statistics.median(usual)
    return [Sample(kinds[kind], unit * statistics.median(found)) for kind, found in enumerate(ratios)]


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
    canvas: int
    refresh: bool


def layouts(rows: int, tokens: int, pool: int, limit: int) -> Iterator[list[Shape]]:
    """Batches to measure: reuse only, refresh only and mixed, that fit the limits of the server."""
    lengths = [length for length in (64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096) if length <= limit] or [limit]
    for batch in every_layout(lengths):
        pages = sum(-(-shape.canvas // PAGE) * PAGE for shape in batch)
        if len(batch) <= rows and packed(batch) <= tokens and pages <= pool:
            yield batch


def packed(batch: Sequence[Shape]) -> int:
    """Tokens of a step."""
    return sum(shape.canvas if shape.refresh else ANSWER for shape in batch)


def every_layout(lengths: Sequence[int]) -> Iterator[list[Shape]]:
    for count in REUSE_ROWS:
        for length in lengths[1::2]:
            yield [Shape(length, False)] * count
    for count in REFRESH_ROWS:
        for length in lengths:
            yield [Shape(length, True)] * count
    for fresh in (1, 2, 3):
        for count in (1, 3, 6, 12):
            for length in lengths[::2]:
                yield [Shape(length, True)] * fresh + [Shape(length, False)] * count


def laid_out(table: RequestTable, rows: list[Shape], mask_id: int, rng: random.Random, vocab: int) -> tuple[Span, ...]:
    """Fill rows of the table with random canvases whose last block is masked."""
    spans, kv_start = [], 0
    for row, (canvas, refresh) in enumerate(rows):
        prompt = max(1, canvas - ANSWER)
        ids = np.array([rng.randrange(min(vocab, 250)) for _ in range(prompt)], dtype=np.int32)
        generation = table.fill(row, ids, canvas, mask_id, Decoding())
        start, length = (0, canvas) if refresh else (prompt, canvas - prompt)
        spans.append(Span(row, generation, kv_start, start, length, canvas, prompt, canvas, 0, 0))
        kv_start += -(-canvas // PAGE) * PAGE
    return tuple(spans)


# quality


async def quality(
    engine: Engine, questions: dict[str, list[tuple[Question, Problem | None]]], seen: Seen
) -> QualityProfile:
    """Ask every question at every level; steps are counted from what the workers report, accuracy is paired."""
    forecast = engine.scheduler.estimates.forecast
    forecast.learns = False
    total = sum(map(len, questions.values())) * len(LEVELS)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        seen("quality", done, total)

    found: dict[str, list[list[Answer]]] = {}
    lengths: dict[str, list[int]] = {}
    for task, items in questions.items():
        prompts = [item[0].prompt for item in items]
        lengths[task] = [len(await engine.tokenize(chat(engine, prompt))) for prompt in prompts]
        if edges := quantiles(lengths[task]):
            forecast.lengths[task] = edges
        reference: list[str] = []
        found[task] = []
        for level in LEVELS:
            texts = await asked(engine, task, prompts, level, one_more)
            reference = reference or [text for text, _ in texts]
            rows = zip(items, texts, reference, strict=True)
            found[task].append([Answer(judged(item, text, own), steps) for item, (text, steps), own in rows])
    seen_steps = forecast.seen()
    profile = profile_of(found, seen_steps)
    steps = {task: [answer.steps for answer in levels[0]] for task, levels in found.items()}
    known = dict(profile.tasks)
    for task, edges in forecast.lengths.items():
        known[task] = split(known[task], task, edges, by_kind(lengths[task], edges, steps[task]), seen_steps)
    profile = msgspec.structs.replace(profile, tasks=known)
    return msgspec.structs.replace(profile, spread=unexplained_spread(profile, lengths, steps, longest_answer(engine)))


def split(
    profile: TaskProfile, task: str, edges: Sequence[int], steps: Sequence[Sequence[int]], seen: Counts
) -> TaskProfile:
    """The task with laws by length of prompt, if that tells enough; `steps` of one request by the finest kinds."""
    cuts = parted(steps, KINDS, FEWEST, GAIN)
    if information(steps, cuts) < TELLING:
        return profile
    kinds = [
        merged([observed_laws(seen, kind_of(task, kind)) for kind in range(start, end)])
        for start, end in pairwise([0, *cuts, len(steps)])
    ]
    return msgspec.structs.replace(profile, lengths=tuple(edges[cut - 1] for cut in cuts), by_length=tuple(kinds))


def unexplained_spread(
    profile: QualityProfile, lengths: Mapping[str, Sequence[int]], steps: Mapping[str, Sequence[int]], answer: int
) -> float:
    """The relative spread of the steps of like requests beyond what the laws say.

    Answers have up to `answer` tokens.
    """
    ahead, kinds = Forecast(profile), dict[str, list[int]]()
    for task, counts in steps.items():
        for length, count in zip(lengths[task], counts, strict=True):
            kinds.setdefault(ahead.kind(task, length), []).append(count)
    block = profile.block_length
    more = squares = 0.0
    for kind, counts in kinds.items():
        law = ahead.outlook(kind, 0, 0, min(block, answer), max(1, answer // block), block, False)
        more += len(counts) * (statistics.pvariance(counts) - law.variance)
        squares += len(counts) * statistics.fmean(counts) ** 2
    return round(math.sqrt(max(0.0, more) / squares), 3)


def quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    """Prompt lengths that part the prompts into `FINEST` kinds of like size, as far as there are so many lengths."""
    ordered = sorted(lengths)
    ends = {ordered[len(ordered) * kind // FINEST] for kind in range(1, FINEST)}
    return tuple(sorted(ends - {ordered[-1]}))


def by_kind(lengths: Sequence[int], edges: Sequence[int], steps: Sequence[int]) -> list[list[int]]:
    """Steps by kind of prompt, the shortest first."""
    kinds: list[list[int]] = [[] for _ in range(len(edges) + 1)]
    for length, count in zip(lengths, steps, strict=True):
        kinds[bisect_left(edges, length)].append(count)
    return kinds


def information(steps: Sequence[Sequence[int]], cuts: Sequence[int]) -> float:
    """The share of the variance of the steps that these parts of the kinds explain."""
    everything = [count for kind in steps for count in kind]
    total = statistics.pvariance(everything) * len(everything)
    parts = [[count for kind in steps[start:end] for count in kind] for start, end in pairwise([0, *cuts, len(steps)])]
    within = sum(len(part) * statistics.pvariance(part) for part in parts)
    return 1.0 - within / total if total else 0.0


async def asked(
    engine: Engine, task: str, prompts: Sequence[str], level: float, one_more: Callable[[], None]
) -> list[tuple[str, int]]:
    """Answers and their steps, a few requests at a time."""
    gate = asyncio.Semaphore(CHATTER)
    options = Options(confidence_threshold=level, task=task, max_tokens=longest_answer(engine))

    async def ask(prompt: str) -> tuple[str, int]:
        async with gate:
            try:
                answer = await engine.generate(chat(engine, prompt), options)
            except BadRequest as error:
                raise ConfigError(f"the problem {prompt[:60]!r} cannot be asked: {error.message}") from error
        one_more()
        return answer.text, answer.usage.steps

    return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))


def longest_answer(engine: Engine) -> int:
    return min(128, engine.model.max_model_len // 2)


def chat(engine: Engine, prompt: str) -> str | list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if engine.text.template else prompt


def judged(item: tuple[Question, Problem | None], text: str, reference: str) -> bool:
    """By the task's rule, by the given answer, or by agreement with the reference threshold's answer."""
    question, problem = item
    if problem is not None:
        return problems.check(problem, text)
    expected = reference if question.answer is None else question.answer
    return " ".join(text.split()) == " ".join(expected.split())


def observed_laws(seen: Counts, kind: str) -> Laws:
    empty: list[list[float]] = [[] for _ in BINS]
    return tuple(
        tuple(Law(tuple(tuple(counts) for counts in seen.get((kind, level, part), empty))) for part in range(PARTS))
        for level in range(len(LEVELS))
    )


def merged(kinds: Sequence[Laws]) -> Laws:
    """The laws of several kinds of request as one."""
    return tuple(
        tuple(summed(laws) for laws in zip(*parts, strict=True))  # those of one part of the canvas
        for parts in zip(*kinds, strict=True)  # those of one level
    )


def profile_of(found: dict[str, list[list[Answer]]], seen: Counts) -> QualityProfile:
    known = {}
    for task, levels in found.items():
        pairs = [drop(levels[0], answers) for answers in levels]
        known[task] = TaskProfile(
            laws=observed_laws(seen, task),
            drop=isotonic([bound for _, bound in pairs]),
            mean_drop=isotonic([mean for mean, _ in pairs]),
            accuracy=round(100 * statistics.fmean(answer.right for answer in levels[0]), 2),
            steps=tuple(round(statistics.fmean(answer.steps for answer in answers), 3) for answers in levels),
            samples=len(levels[0]),
        )
    worst = tuple(max(task.drop[level] for task in known.values()) for level in range(len(LEVELS)))
    mean = tuple(max(task.mean_drop[level] for task in known.values()) for level in range(len(LEVELS)))
    known[ANY] = TaskProfile(laws=observed_laws(seen, ANY), drop=worst, mean_drop=mean)
    return QualityProfile(tasks=known)


def drop(reference: Sequence[Answer], answers: Sequence[Answer]) -> tuple[float, float]:
    """Points lost against the reference on the same problems: the mean, and its pessimistic bound."""
    differences = [float(a.right) - float(b.right) for a, b in zip(reference, answers, strict=True)]
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return 100 * mean, 100 * (mean + SIDE * spread)


# the whole


def unmeasured(config: Config, progress: Progress) -> Parts:
    """The model as if it had no profile, whatever there is: that has other levels, or is damaged."""
    return real(config, progress, measured=False)


def questions_from(file: Path | None, per_task: int) -> dict[str, list[tuple[Question, Problem | None]]]:
    """The problems of the package, or the questions of a JSONL file by their task; raises `ConfigError`."""
    if file is None:
        return {
            task: [(Question(problem.prompt, problem.answer, task), problem) for problem in held_out(task, per_task)]
            for task in TASKS
        }
    found: dict[str, list[tuple[Question, Problem | None]]] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line.strip():
                question = msgspec.json.decode(line, type=Question)
                found.setdefault(question.task, []).append((question, None))
    except OSError as error:
        raise ConfigError(f"cannot read the problems {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON lines of prompt, answer and task: {error}") from error
    if not found:
        raise ConfigError(f"{file} holds no problems")
    return {task: items[:per_task] for task, items in found.items()}


async def calibrate(
    config: Config, problems: Path | None, per_task: int, seen: Seen, known: ModelProfile | None = None
) -> tuple[ModelProfile, list[Sample], StepCost]:
    """Measure quality, then step costs; those of other devices are taken from `known`. The profile is not written."""
    questions = questions_from(problems, per_task)
    device = listed(config.device.devices)[0]
    async with Engine(config, quiet, unmeasured) as engine:
        measured_quality = await quality(engine, questions, seen)
        limit, name = engine.model.max_model_len, engine.model.name
    samples = await step_costs(config, limit, seen, unmeasured)
    laws = {degree: fit(taken) for degree, taken in samples.items()}
    costs: dict[str, StepCost] = {
        **(known.costs if known else {}),
        **{profile_file.cost_key(device, degree): law for degree, law in laws.items()},
    }
    profile = ModelProfile(
        model=name,
        made=datetime.date.today().isoformat(),
        machine=machine(),
        costs=costs,
        quality=measured_quality,
    )
    least = min(laws)
    return profile, samples[least], laws[least]


def machine() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def quiet(device: str, done: int, total: int) -> None:
    """Nobody watches the weights being loaded."""
