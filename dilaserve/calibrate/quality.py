"""Measure steps and accuracy by threshold and task: the decode-speed profile of a model."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from dilaserve.calibrate.answers import Answer, Question, Questions, asked, chat, judged, longest_answer
from dilaserve.calibrate.fitting import isotonic, parted
from dilaserve.calibrate.kept import MeasuredAnswer, Measurements
from dilaserve.calibrate.progress import Seen
from dilaserve.engine.engine import Engine
from dilaserve.profile.decode_speed import (
    ANY,
    BINS,
    LEVELS,
    PARTS,
    Law,
    Laws,
    QualityProfile,
    TaskProfile,
    gather,
    kind_of,
    summed,
)
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.problems.problem import Problem

SIDE = 1.282  # normal quantile of a one-sided 90 % bound
FINEST = 64  # kinds of prompts by length that a task is measured by
KINDS, FEWEST = 8, 50  # kinds that it is split into, at most, and the problems of one, at least
TELLING = 0.1  # share of the variance of the steps that these kinds must explain, else the task is not split
GAIN = 0.01  # share that a further kind must explain
Counts = dict[tuple[str, int, int], list[list[float]]]  # of steps, by kind of request, level and part of the canvas


async def quality(engine: Engine, questions: Questions, seen: Seen, measured: Measurements) -> QualityProfile:
    """Ask every question at every level that is not `measured` yet; accuracy is paired.

    Steps are counted from what the workers report.
    """
    await ask_missing(engine, questions, seen, measured)
    lengths = {task: await prompt_lengths(engine, items) for task, items in questions.items()}
    edges = {task: ends for task, found in lengths.items() if (ends := quantiles(found))}
    found = {task: judged_answers(task, items, measured) for task, items in questions.items()}
    seen_steps = counted(measured, lengths, edges)
    profile = profile_of(found, seen_steps)
    profile = msgspec.structs.replace(profile, block_length=engine.model.traits.block_length or profile.block_length)
    steps = {task: [answer.steps for answer in levels[0]] for task, levels in found.items()}
    known = dict(profile.tasks)
    for task, ends in edges.items():
        known[task] = split(known[task], task, ends, by_kind(lengths[task], ends, steps[task]), seen_steps)
    profile = msgspec.structs.replace(profile, tasks=known)
    return msgspec.structs.replace(profile, spread=unexplained_spread(profile, lengths, steps, longest_answer(engine)))


async def ask_missing(engine: Engine, questions: Questions, seen: Seen, measured: Measurements) -> None:
    """Add the answers that are not measured yet, task by task and level by level."""
    total = answers_of(questions)
    if measured.answers:
        seen("quality", len(measured.answers), total)

    def heard(answer: MeasuredAnswer) -> None:
        measured.add(answer)
        seen("quality", len(measured.answers), total)

    for task, items in questions.items():
        for level in range(len(LEVELS)):
            prompts = {place: item[0].prompt for place, item in enumerate(items)}
            missing = {place: one for place, one in prompts.items() if (task, level, place) not in measured.answers}
            await asked(engine, task, missing, level, heard)


def answers_of(questions: Questions) -> int:
    """How many answers are measured in all."""
    return sum(map(len, questions.values())) * len(LEVELS)


async def prompt_lengths(engine: Engine, items: Sequence[tuple[Question, Problem | None]]) -> list[int]:
    """Tokens of the problems' prompts."""
    return [len(await engine.tokenize(chat(engine, question.prompt))) for question, _ in items]


def judged_answers(
    task: str, items: Sequence[tuple[Question, Problem | None]], measured: Measurements
) -> list[list[Answer]]:
    """The answers to a task's problems, by level; the first level's are the reference."""
    found = []
    for level in range(len(LEVELS)):
        given = [measured.answers[task, level, place] for place in range(len(items))]
        texts = [measured.answers[task, 0, place].text for place in range(len(items))]
        rows = zip(items, given, texts, strict=True)
        found.append([Answer(judged(item, one.text, reference), one.steps) for item, one, reference in rows])
    return found


def counted(measured: Measurements, lengths: Mapping[str, Sequence[int]], edges: Mapping[str, Sequence[int]]) -> Counts:
    """What the steps of all answers did, of each kind of request, of its task, and of any."""
    found: Counts = {}
    for answer in measured.answers.values():
        ends = edges.get(answer.task)
        length = bisect_left(ends, lengths[answer.task][answer.problem]) if ends else 0
        kind = kind_of(answer.task, length) if ends else answer.task
        gather(found, (((kind, *step[:-1]), step.times) for step in answer.counts))
    return found


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
