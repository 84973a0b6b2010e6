"""Batches of examples of like length, made in this process or by workers ahead of the training."""

import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from recipe.examples import Example, examples
from recipe.lessons import Lesson, as_decoded, two_streams
from recipe.sizes import BLOCK, MAX_LENGTH
from recipe.vocabulary import tokenizer

SORTED = 16  # batches' worth of tokens, about, whose examples are sorted by length at once
TYPICAL = 200  # tokens of an example in a batch
GRAIN = 16  # lengths of batches are multiples of this
AHEAD = 48  # batches that wait in the queue
DECAY = 0.3  # share of the run over which the learning rate falls to 0


class Plan(NamedTuple):
    tokens: int  # in a batch
    mix: dict[str, float]  # of the tasks
    fresh: bool  # the run begins with random weights


def difficulty(done: float, luck: float) -> float:
    """Short problems only at first; the full range from the middle of the run on."""
    return min(1.0, max(0.0, 2.5 * done - 0.2) + 0.3 * luck)


def double_share(done: float) -> float:
    """Share of batches with two streams: most at first, none from four fifths of the run on."""
    return 0.75 * min(1.0, max(0.0, (0.8 - done) / 0.2))


def batches(seed: int, plan: Plan, done: Callable[[], float]) -> Iterator[Lesson]:
    rng, chances = random.Random(seed), np.random.default_rng(seed)
    hardness = (lambda: difficulty(done(), rng.random())) if plan.fresh else (lambda: 1.0)
    source = examples(rng, plan.mix, hardness)
    count = SORTED * plan.tokens // TYPICAL
    while True:
        double = plan.fresh and rng.random() < double_share(done())
        drawn = list(itertools.islice(source, count))
        sizes = [doubled(example) if double else canvas(example, rng) for example in drawn]
        order = sorted(range(count), key=sizes.__getitem__)
        for group, length in rng_shuffled(rng, grouped(order, sizes, plan.tokens)):
            make = two_streams if double else as_decoded
            yield make([drawn[i] for i in group], length, chances)


def rng_shuffled(rng: random.Random, groups: Iterator[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    found = list(groups)
    rng.shuffle(found)
    return found


def doubled(example: Example) -> int:
    return len(example.prompt) + 2 * (len(example.answer) + 1)


def canvas(example: Example, rng: random.Random) -> int:
    """The answer's blocks, and more of them, as clients leave more room than an answer needs."""
    blocks = -(-len(example.answer) // BLOCK) + rng.choice((0, 0, 1, 1, 2, 3, 3, 4, 8 if rng.random() < 0.3 else 2))
    if rng.random() < 0.01:
        blocks = MAX_LENGTH // BLOCK
    return min(MAX_LENGTH, len(example.prompt) + blocks * BLOCK)


def grouped(order: list[int], sizes: list[int], tokens: int) -> Iterator[tuple[list[int], int]]:
    """Runs of `order` whose rows, all as long as the longest, hold about so many tokens."""
    group: list[int] = []
    length = 0
    for i in order:
        longer = -(-sizes[i] // GRAIN) * GRAIN
        if group and longer * (len(group) + 1) > tokens:
            yield group, length
            group = []
        group.append(i)
        length = longer
    yield group, length


class Feed:
    """Batches from worker processes, of which each has its own seed; `done` tells them how far the run is."""

    def __init__(self, seed: int, plan: Plan, workers: int) -> None:
        tokenizer()  # once, before the workers are forked
        context = multiprocessing.get_context("fork")
        self.progress = context.Value("d", 0.0)
        self.queue = context.Queue(AHEAD)
        for worker in range(workers):
            arguments = (seed * 1000 + worker, plan, self.progress, self.queue)
            context.Process(target=work, args=arguments, daemon=True).start()
        self.here = None if workers else batches(seed * 1000, plan, lambda: self.progress.value)

    def __next__(self) -> Lesson:
        return next(self.here) if self.here else self.queue.get()


def work(seed: int, plan: Plan, progress, queue) -> None:  # type: ignore[no-untyped-def]
    for batch in batches(seed, plan, lambda: progress.value):
        queue.put(batch)
