"""How fast a canvas fills and how good it gets, as data: steps and accuracy drop by threshold and task.

One law says how many tokens a step unmasks, given the masks left in the block. Where the length of a prompt tells how
long its answer will be, a task has laws by the length of the prompt.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from operator import add

import msgspec

LEVELS = (0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6)  # thresholds that control may choose, the reference first
BINS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64)  # upper ends, in masks left
PARTS = 3  # first block, second block, later ones
ANY = "any"  # the task of requests that name none
PRIOR = 400.0  # weight of what was known of a bin against what is seen, in steps
TRUST = 40.0  # weight of what is known of any task, in steps of one bin


def bin_of(masks: int) -> int:
    return bisect_left(BINS, masks, hi=len(BINS) - 1)


def part_of(block: int) -> int:
    return block if block < PARTS else PARTS - 1


class Law(msgspec.Struct, frozen=True):
    """Counts of what one step did, by bin of masks left: `unmasked[bin][d]` steps unmasked d tokens.

    d = 0 stands for: the request ended, because its text was complete.
    """

    unmasked: tuple[tuple[float, ...], ...]


Laws = tuple[tuple[Law, ...], ...]  # [level][part]
Step = tuple[str, int, int, int, int]  # kind, level, part, bin of the masks left, tokens unmasked


class TaskProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One task: a law by level and part of the canvas, and the accuracy drop in points by level.

    `drop` is against the reference level, its one-sided 90 % bound and never falling with the level;
    `mean_drop` is the estimate itself. `samples` counts problems a level.
    """

    laws: Laws
    drop: tuple[float, ...]
    mean_drop: tuple[float, ...]
    accuracy: float | None = None
    steps: tuple[float, ...] = ()
    samples: int = 0
    lengths: tuple[int, ...] = ()  # prompt tokens, upper ends of all kinds of prompts but the longest
    by_length: tuple[Laws, ...] = ()  # laws by kind, one more than `lengths`; empty where the length tells nothing


class QualityProfile(msgspec.Struct, frozen=True, kw_only=True):
    """All tasks; `any` is the law over all of them together, with the largest drops among them.

    `spread` is the relative spread of the steps of like requests beyond what the laws say.
    """

    tasks: dict[str, TaskProfile]
    block_length: int = 32
    levels: tuple[float, ...] = LEVELS
    spread: float = 0.2

    def task(self, name: str | None) -> TaskProfile:
        return self.tasks.get(name or ANY, self.tasks[ANY])


def pooled(laws: Sequence[Law], bin: int) -> list[float]:
    """Counts of one bin by what a step did.

    The first law counts in full; those behind it know more of less like requests, and each counts as at most `TRUST`
    steps.
    """
    rows = [law.unmasked[bin] for law in laws]
    sums = [0.0] * max(1, *map(len, rows))
    for place, counts in enumerate(rows):
        share = TRUST / max(sum(counts), TRUST) if place else 1.0
        for d, count in enumerate(counts):
            sums[d] += share * count
    return sums


def chances(laws: Sequence[Law], masks: int) -> list[float]:
    """p(d | masks left), d from 0 (the request ends) to `masks`."""
    counts = pooled(laws, bin_of(masks))
    total = sum(counts)
    if total <= 0:
        counts, total = [0.0, 1.0], 1.0
    odds = [count / total for count in counts[: masks + 1]]
    odds += [0.0] * (masks + 1 - len(odds))
    odds[masks] += sum(counts[masks + 1 :]) / total
    return odds


def laws_of(known: Mapping[str, Laws], kind: str, level: int, part: int) -> list[Law]:
    """The law of a kind, and behind it those of its task and of any; what none knows is as in the part before."""
    names = dict.fromkeys((kind, task_of(kind), ANY))
    laws = [known[name][level][part] for name in names if name in known]
    unknown = {bin for bin in range(len(BINS)) if not any(law.unmasked[bin] for law in laws)} if part else ()
    if unknown:
        before = laws_of(known, kind, level, part - 1)
        laws.append(Law(tuple(tuple(pooled(before, bin)) if bin in unknown else () for bin in range(len(BINS)))))
    return laws


def gather(seen: dict[tuple[str, int, int], list[list[float]]], counts: Iterable[tuple[Step, int]]) -> None:
    """Add counts of steps to `seen`, as laws have them, by level and part: of each kind, of its task, and of any."""
    for (kind, level, part, bin, unmasked), count in counts:
        for name in {kind, task_of(kind), ANY}:
            row = seen.setdefault((name, level, part), [[] for _ in BINS])[bin]
            row.extend([0.0] * (unmasked + 1 - len(row)))
            row[unmasked] += count


def kind_of(task: str, length: int) -> str:
    return f"{task}\0{length}"


def task_of(kind: str) -> str:
    return kind.partition("\0")[0]


def by_kind(profile: QualityProfile) -> Iterator[tuple[str, Laws]]:
    for name, task in profile.tasks.items():
        yield name, task.laws
        for length, laws in enumerate(task.by_length):
            yield kind_of(name, length), laws


def added(law: Law, seen: list[list[float]]) -> Law:
    rows = []
    for known, new in zip(law.unmasked, seen, strict=True):
        weight = min(1.0, PRIOR / max(1.0, sum(known)))
        width = max(len(known), len(new))
        old = [weight * count for count in known] + [0.0] * (width - len(known))
        rows.append(tuple(map(add, old, new + [0.0] * (width - len(new)))))
    return Law(tuple(rows))


def summed(laws: Sequence[Law]) -> Law:
    """Several laws as one: their counts added up."""
    bins = zip(*(law.unmasked for law in laws), strict=True)
    return Law(tuple(tuple(map(sum, zip_longest(*rows, fillvalue=0.0))) for rows in bins))
