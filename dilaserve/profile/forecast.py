"""The decode-speed profile as the scheduler asks it, and how it learns from the steps that are served."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import msgspec

from dilaserve.profile.block_chain import Chain, Outlook, alike, chain, with_block
from dilaserve.profile.decode_speed import (
    ANY,
    PARTS,
    Law,
    Laws,
    QualityProfile,
    Step,
    added,
    bin_of,
    by_kind,
    gather,
    kind_of,
    laws_of,
    part_of,
)

FIRST_LOOK, RELEARN = 100, 8000  # steps until what was learned while serving is taken in: doubling, up to the second
MOST_CHAINS = 1024  # that are kept; requests may bring any block length
MOST_THRESHOLDS = 4096  # that are remembered; requests may bring any
COUNTS_A_STEP = 64  # counts of steps that are added up in one part, in about 0.1 ms
EACH = 8  # steps of rows, at one of which a part of the learning is done, in 1 to 2 ms
DONE = object()
ChainKey = tuple[str, int, int, int]  # kind, level, part, block length


class ThresholdStep(NamedTuple):
    """A level worth choosing, and what it yields beyond the rung before: the share of the steps saved for a point."""

    threshold: float
    yields: float


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

    @contextmanager
    def unkept(self) -> Iterator[None]:
        """What is worked out meanwhile is not kept: the more there is, the more slowly new laws are taken in."""
        kept = dict(self.chains), dict(self.known_tracks), dict(self.ladders)
        try:
            yield
        finally:
            self.chains, self.known_tracks, self.ladders = kept

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
