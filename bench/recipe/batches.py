"""Batches of examples of like length, made in this process or by workers ahead of the training."""

import itertools
import multiprocessing
import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from recipe.examples import Example, examples
from recipe.lessons import Canvas, Lesson, as_decoded, to_be_decoded, two_streams
from recipe.sizes import BLOCK, MAX_LENGTH
from recipe.vocabulary import tokenizer

SORTED = 16  # batches' worth of tokens, about, whose examples are sorted by length at once
TYPICAL = 200  # tokens of an example in a batch
GRAIN = 16  # rows and lengths of batches are multiples of this, so that kernels are compiled once
AHEAD, PINNED = 96, 6  # batches that wait in the queue between processes, and in pinned memory


class Plan(NamedTuple):
    tokens: int  # in a batch
    mix: dict[str, float]  # of the tasks
    fresh: bool  # the run begins with random weights
    streams: float  # share of the run in which some batches have two streams
    rollouts: float  # share of the other batches that the net decodes itself


def difficulty(fresh: bool, done: float, rng: random.Random) -> float:
    """Short problems only at first; later the full range, with some short ones."""
    if rng.random() < 0.4:
        return rng.random()
    return min(1.0, 0.1 + 3 * done) if fresh else 1.0


def double_share(streams: float, done: float) -> float:
    """Share of batches with two streams: many at first, then none."""
    return 0.7 * min(1.0, max(0.0, (streams - done) / 0.2))


def batches(seed: int, plan: Plan, done: Callable[[], float]) -> Iterator[Lesson | Canvas]:
    rng, chances = random.Random(seed), np.random.default_rng(seed)
    source = examples(rng, plan.mix, lambda: difficulty(plan.fresh, done(), rng))
    count = SORTED * plan.tokens // TYPICAL
    while True:
        double = rng.random() < double_share(plan.streams, done())
        drawn = list(itertools.islice(source, count))
        sizes = [doubled(example) if double else canvas(example, rng) for example in drawn]
        order = sorted(range(count), key=sizes.__getitem__)
        for group, length in rng_shuffled(rng, grouped(order, sizes, plan.tokens)):
            alone = to_be_decoded if rng.random() < plan.rollouts else as_decoded
            make = two_streams if double else alone
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
    """Runs of `order` whose rows, all as long as the longest, hold at most so many tokens; a rest is left out."""
    first = 0
    while first < len(order):
        rows = whole(tokens // sizes[order[first]])
        longest = sizes[order[min(first + rows, len(order)) - 1]]
        rows = whole(tokens // longest)
        group = order[first : first + rows]
        if len(group) == rows:
            yield group, -(-longest // GRAIN) * GRAIN
        first += rows


def whole(rows: int) -> int:
    return max(GRAIN, rows // GRAIN * GRAIN)


class Feed:
    """Batches from worker processes, of which each has its own seed; `done` tells them how far the run is.

    A thread lays them into pinned memory ahead of a GPU, so that their way there does not hold up the launches.
    """

    def __init__(self, seed: int, plan: Plan, workers: int, pinned: bool) -> None:
        tokenizer()  # once, before the workers are forked
        context = multiprocessing.get_context("fork")
        self.progress = context.Value("d", 0.0)
        self.made = context.Queue(AHEAD)
        self.ready: queue.Queue[Lesson | Canvas] = queue.Queue(PINNED)
        self.pinned = pinned
        for worker in range(workers):
            arguments = (seed * 1000 + worker, plan, self.progress, self.made)
            context.Process(target=work, args=arguments, daemon=True).start()
        threading.Thread(target=self.collect, daemon=True).start()

    def collect(self) -> None:
        while True:
            batch = self.made.get()
            self.ready.put(type(batch)(*(None if part is None else self.laid(part) for part in batch)))

    def laid(self, part: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(part)
        return tensor.pin_memory() if self.pinned else tensor

    def next(self, device: torch.device) -> Lesson | Canvas:
        """On the device, with ids as torch wants them."""
        batch = self.ready.get()
        parts = [None if part is None else part.to(device, non_blocking=True) for part in batch]
        return type(batch)(*(part if part is None or part.is_floating_point() else part.long() for part in parts))


def work(seed: int, plan: Plan, progress, made) -> None:  # type: ignore[no-untyped-def]
    for batch in batches(seed, plan, lambda: progress.value):
        made.put(batch)
