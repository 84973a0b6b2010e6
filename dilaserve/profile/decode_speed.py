"""How fast a canvas fills and how good it gets: steps and accuracy drop by threshold and task.

One law says how many tokens a step unmasks, given the masks left in the block; a Markov chain over it gives the mean
and the variance of the steps that a request still needs. Where the length of a prompt tells how long its answer will
be, a task has laws by the length of the prompt.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise, zip_longest
from operator import add, mul
from typing import NamedTuple

import msgspec

LEVELS = (0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6)  # thresholds that control may choose, the reference first
BINS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64)  # upper ends, in masks left
PARTS = 3  # first block, second block, later ones
ANY = "any"  # the task of requests that name none
FIRST_LOOK, RELEARN = 100, 8000  # steps until what was learned while serving is taken in: doubling, up to the second
PRIOR = 400.0  # weight of what was known of a bin against what is seen, in steps
MOST_CHAINS = 1024  # that are kept; requests may bring any block length
MOST_THRESHOLDS = 4096  # that are remembered; requests may bring any
TRUST = 40.0  # weight of what is known of any task, in steps of one bin
RARELY = 1e-4  # times that a text is expected to end in some blocks, below which an approximation is used
ROUNDING = 1e-12  # of a sum of squares, that is no difference


COUNTS_A_STEP = 64  # counts of steps that are added up in one part, in about 0.1 ms
EACH = 8  # steps of rows, at one of which a part of the learning is done, in 1 to 2 ms
DONE = object()


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
ChainKey = tuple[str, int, int, int]  # kind, level, part, block length
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


class ThresholdStep(NamedTuple):
    """A level worth choosing, and what it yields beyond the rung before: the share of the steps saved for a point."""

    threshold: float
    yields: float


class Outlook(NamedTuple):
    """What is ahead of a request: steps and their variance, refreshes; means."""

    steps: float
    variance: float
    refreshes: float


class Chain(NamedTuple):
    """A block by masks left, [block_length + 1]: steps to come, their variance, chance that the text ends in it."""

    steps: tuple[float, ...]
    variance: tuple[float, ...]
    ends: tuple[float, ...]


def chain(laws: Sequence[Law], block_length: int) -> Chain:
    """Mean, variance and ending by recursion over masks left, s(m) = 1 + Σ p(d|m) s(m-d).

    Blocks longer than the longest bin are taken to go on at the same pace.
    """
    steps, squares, ends = [0.0], [0.0], [0.0]
    counts = [pooled(laws, bin) for bin in range(len(BINS))]
    for masks in range(1, min(block_length, BINS[-1]) + 1):
        odds = counts[bin_of(masks)]
        total = sum(odds)
        if total <= 0:  # nothing known of this bin: one token a step, the slowest there is
            odds, total = [0.0, 1.0], 1.0
        part = odds[1:masks]  # what unmasks some, and leaves masks - 1, masks - 2, …
        mean = sum(map(mul, part, reversed(steps))) / total
        square = sum(map(mul, part, reversed(squares))) / total
        end = (odds[0] + sum(map(mul, part, reversed(ends)))) / total
        steps.append(1 + mean)
        squares.append(1 + 2 * mean + square)
        ends.append(end)
    variance = [max(0.0, square - mean * mean) for square, mean in zip(squares, steps, strict=True)]
    for masks in range(len(steps), block_length + 1):
        steps.append(steps[BINS[-1]] * masks / BINS[-1])
        variance.append(variance[BINS[-1]] * masks / BINS[-1])
        ends.append(ends[BINS[-1]])
    return Chain(tuple(steps), tuple(variance), tuple(ends))


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


class Track(NamedTuple):
    """A block at one threshold, and what comes after it."""

    law: Chain
    after: Outlook


class Forecast:
    """The profile as the scheduler asks it: outlooks by kind of request, level and place, worked out once and kept.

    A kind (`kind`) is a task, or one of its lengths of prompts.
    """

    def __init__(self, profile: QualityProfile) -> None:
        self.profile = profile
        self.learns = True  # else counts are only kept, under the tasks' own names
        self.lengths = {name: task.lengths for name, task in profile.tasks.items() if task.lengths}
        self.laws: dict[str, Laws] = dict(by_kind(profile))
        self.observed, self.next_look = 0, FIRST_LOOK
        self.version = 0  # how often the laws have changed
        self.counts: dict[Step, int] = {}  # steps since the laws were last worked out
        self.learning: Iterator[None] | None = None  # what is left to do until the laws have taken them in
        self.chains: dict[ChainKey, Chain] = {}
        self.known_tracks: dict[tuple[str, tuple[int, ...], int, int, int], list[Track]] = {}
        self.ladders: dict[str, list[ThresholdStep]] = {}
        self.nearest: dict[float, int] = {}  # level by threshold

    def kind(self, task: str | None, prompt_tokens: int) -> str:
        name = self.name(task) if self.learns else task or ANY
        lengths = self.lengths.get(name)
        return kind_of(name, bisect_left(lengths, prompt_tokens)) if lengths else name

    def observe(self, kind: str, level: int, part: int, masks: int, unmasked: int) -> None:
        """A step has unmasked so many tokens, 0 when the text ended; now and then the laws take it in.

        That is done in small parts, one at a step, so that no step waits for all of it.
        """
        step = kind, level, part, bin_of(masks), unmasked
        self.counts[step] = self.counts.get(step, 0) + 1
        self.observed += 1
        if self.learning is not None and self.observed % EACH == 0 and next(self.learning, DONE) is DONE:
            self.learning = None
        if self.observed >= self.next_look and self.learns and self.learning is None:
            self.next_look += min(self.observed, RELEARN)
            self.learning = self.learned()

    def relearn(self) -> None:
        """Take in at once what was seen."""
        for learning in (self.learning or (), self.learned()):
            for _ in learning:
                pass
        self.learning = None

    def seen(self) -> dict[tuple[str, int, int], list[list[float]]]:
        """What was counted, as laws have it, by level and part: of each kind, of its task, and of any."""
        found: dict[tuple[str, int, int], list[list[float]]] = {}
        gather(found, self.counts.items())
        return found

    def learned(self) -> Iterator[None]:
        """Add what was seen to the counts of the profile, each bin of which counts as at most `PRIOR` steps.

        Of a kind of request what it did counts for itself, for its task, and for any. Nothing changes before the end.
        """
        counts, self.counts = list(self.counts.items()), {}
        return self.learned_from(counts)

    def learned_from(self, counts: Sequence[tuple[Step, int]]) -> Iterator[None]:
        seen: dict[tuple[str, int, int], list[list[float]]] = {}
        for start in range(0, len(counts), COUNTS_A_STEP):
            gather(seen, counts[start : start + COUNTS_A_STEP])
            yield
        laws: dict[str, list[list[Law]]] = {}
        for (kind, level, part), rows in seen.items():
            levels = laws.setdefault(kind, [list(parts) for parts in self.laws[kind]])
            levels[level][part] = added(levels[level][part], rows)
            yield
        changed = {kind: tuple(tuple(parts) for parts in levels) for kind, levels in laws.items()}
        chains: dict[ChainKey, Chain] = {}
        for key in list(self.chains):
            chains[key] = chain(laws_of({**self.laws, **changed}, *key[:3]), key[3])
            yield
        self.take_in(changed, chains)

    def take_in(self, laws: Mapping[str, Laws], chains: dict[ChainKey, Chain]) -> None:
        """These are the laws of their kinds from now on, and these chains were worked out from them."""
        self.laws |= laws
        tasks = {
            name: msgspec.structs.replace(
                task,
                laws=self.laws[name],
                by_length=tuple(self.laws[kind_of(name, length)] for length in range(len(task.by_length))),
            )
            for name, task in self.profile.tasks.items()
        }
        self.profile = msgspec.structs.replace(self.profile, tasks=tasks)
        self.version += 1
        self.chains = chains
        self.known_tracks.clear()
        self.ladders.clear()

    def name(self, task: str | None) -> str:
        return task if task is not None and task in self.profile.tasks else ANY

    def level_of(self, threshold: float) -> int:
        """The level of the profile that is nearest above this threshold."""
        level = self.nearest.get(threshold)
        if level is None:
            if len(self.nearest) >= MOST_THRESHOLDS:
                self.nearest.clear()
            level = max((i for i, known in enumerate(self.profile.levels) if known >= threshold - 1e-6), default=0)
            self.nearest[threshold] = level
        return level

    def drop(self, task: str | None, level: int) -> float:
        return self.profile.task(task).drop[level]

    def mean_drop(self, task: str | None, level: int) -> float:
        return self.profile.task(task).mean_drop[level]

    def ladder(self, task: str | None) -> list[ThresholdStep]:
        """The levels that control should choose among for a task, the reference first.

        Each yields less than the one before; without measured steps those of one block by the laws count.
        """
        name, profile = self.name(task), self.profile
        if name not in self.ladders:
            known = profile.tasks[name]
            levels, length = range(len(profile.levels)), profile.block_length
            steps = known.steps or [self.chain(name, level, 0, length).steps[length] for level in levels]
            kept = hull(known.drop, steps)
            yields = [math.inf, *(slope(known.drop, steps, a, b) / steps[0] for a, b in pairwise(kept))]
            self.ladders[name] = [
                ThresholdStep(profile.levels[level], one) for level, one in zip(kept, yields, strict=True)
            ]
        return self.ladders[name]

    def laws_of(self, kind: str, level: int, part: int) -> list[Law]:
        return laws_of(self.laws, kind, level, part)

    def chain(self, kind: str, level: int, part: int, block_length: int) -> Chain:
        key = (kind, level, part, block_length)
        found = self.chains.get(key)
        if found is None:
            if len(self.chains) >= MOST_CHAINS:
                self.chains.clear()
            found = self.chains[key] = chain(self.laws_of(kind, level, part), block_length)
        return found

    def ahead(self, kind: str, level: int, block: int, count: int, block_length: int) -> Outlook:
        """What is ahead at the start of block `block` of a canvas of `count` blocks."""
        law = self.chain(kind, level, part_of(block), block_length)
        if part_of(block) == PARTS - 1 or block >= count:
            return alike(law, block_length, max(0, count - block))
        return with_block(law, block_length, self.ahead(kind, level, block + 1, count, block_length), 1.0)

    def track(self, kind: str, level: int, block: int, count: int, block_length: int) -> Track:
        """Block `block` of `count`, and what comes after it; valid until `version` moves on."""
        law = self.chain(kind, level, part_of(block), block_length)
        return Track(law, self.ahead(kind, level, block + 1, count, block_length))

    def tracks(self, kind: str, levels: tuple[int, ...], block: int, count: int, block_length: int) -> list[Track]:
        """The same by level."""
        key = (kind, levels, block, count, block_length)
        found = self.known_tracks.get(key)
        if found is None:
            if len(self.known_tracks) >= MOST_CHAINS:
                self.known_tracks.clear()
            found = [self.track(kind, level, block, count, block_length) for level in levels]
            self.known_tracks[key] = found
        return found

    def outlook(
        self, kind: str, level: int, block: int, masks: int, count: int, block_length: int, fresh: bool
    ) -> Outlook:
        """What is ahead of a request in block `block` of `count` with `masks` left in it."""
        law, after = self.track(kind, level, block, count, block_length)
        return with_block(law, masks, after, 0.0 if fresh else 1.0)


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


def with_block(law: Chain, masks: int, after: Outlook, refreshes: float) -> Outlook:
    """A block with `masks` left, and what comes after it unless the text ends inside."""
    stays = 1.0 - law.ends[masks]
    variance = law.variance[masks] + stays * after.variance + stays * (1 - stays) * after.steps**2
    return Outlook(law.steps[masks] + stays * after.steps, variance, refreshes + stays * after.refreshes)


def alike(law: Chain, masks: int, blocks: int) -> Outlook:
    """So many blocks of one law, one after the other, unless the text ends in one: repeated `with_block`, summed up.

    With r the chance that the text goes on after a block, steps are a geometric sum A(1 - r^n), and the variance that
    the end of the text brings, r(1 - r)A²(1 - r^k)² after k blocks, is three of them.
    """
    steps, variance, ends = law.steps[masks], law.variance[masks], law.ends[masks]
    if blocks * ends < RARELY:  # the sums would cancel out; their first terms in r - 1 are exact enough
        times = blocks * (1.0 - (blocks - 1) * ends / 2)
        squares = blocks * (blocks - 1) * (2 * blocks - 1) / 6
        return Outlook(steps * times, variance * times + ends * steps**2 * squares, times)
    stays = 1.0 - ends
    if stays <= 0.0:
        return Outlook(steps, variance, 1.0)
    last = math.exp((blocks - 1) * math.log1p(-ends))  # chance that the last block is begun
    times = -math.expm1(blocks * math.log1p(-ends)) / ends  # blocks that are begun, on average
    spread = stays * ends * (steps / ends) ** 2 * (times - 2.0 * blocks * last + last * times)
    return Outlook(steps * times, max(0.0, variance * times + spread), times)


def isotonic(drops: Sequence[float]) -> tuple[float, ...]:
    """The nearest values (least squares) that start at 0 and never fall (pool adjacent violators)."""
    pools: list[list[float]] = []
    for drop in drops:
        pools.append([drop, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (value, size), (before, count) = pools.pop(), pools.pop()
            pools.append([(value * size + before * count) / (size + count), size + count])
    flat = [value for value, size in pools for _ in range(int(size))]
    return (0.0, *(max(0.0, value) for value in flat[1:]))


def parted(groups: Sequence[Sequence[float]], most: int, least: int, gain: float) -> list[int]:
    """Where to cut a row of groups of numbers, so that numbers of one part are as alike as they can be.

    Gives the ends of all parts but the last, in groups. Of at most `most` parts with at least `least` numbers each, the
    fewest that leave at most the share `gain` of the whole variance more than the best do.
    """
    counts = [0, *accumulate(map(len, groups))]
    sums = [0.0, *accumulate(map(sum, groups))]
    squares = [0.0, *accumulate(sum(map(mul, group, group)) for group in groups)]

    def spread(start: int, end: int) -> float:
        count, total = counts[end] - counts[start], sums[end] - sums[start]
        return squares[end] - squares[start] - total * total / count if count >= least else math.inf

    whole = range(1, len(groups) + 1)
    rows = [[(0.0 if end == 0 else math.inf, 0) for end in range(len(groups) + 1)]]  # [parts][end]: variance, last cut
    for _ in range(most):
        before = rows[-1]
        best = [min((before[cut][0] + spread(cut, end), cut) for cut in range(end)) for end in whole]
        rows.append([(math.inf, 0), *best])
    left = [row[-1][0] for row in rows]
    enough = min(left) + gain * spread(0, len(groups)) + ROUNDING * squares[-1]
    parts = next((parts for parts, variance in enumerate(left) if parts and variance <= enough), 1)
    cuts, end = [], len(groups)
    for row in rows[parts:0:-1]:
        end = row[end][1]
        cuts.append(end)
    return cuts[-2::-1]


def hull(drops: Sequence[float], steps: Sequence[float]) -> list[int]:
    """Levels on the lower convex hull of steps over drops, the first always: no mixture of others is as good.

    `drops` never fall.
    """
    kept = [0]
    for level in range(1, len(drops)):
        if steps[level] >= steps[kept[-1]]:
            continue
        while len(kept) > 1 and slope(drops, steps, kept[-1], level) >= slope(drops, steps, kept[-2], kept[-1]):
            kept.pop()
        kept.append(level)
    return kept


def slope(drops: Sequence[float], steps: Sequence[float], a: int, b: int) -> float:
    """Steps saved for each point lost on the way from level a to level b."""
    return (steps[a] - steps[b]) / max(1e-9, drops[b] - drops[a])
