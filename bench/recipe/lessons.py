"""What a batch teaches: which tokens are masked, and how much each counts. Plain numpy, so that worker processes can.

The masks are those that block decoding shows: everything after the active block is masked, everything before it is
visible, and inside it mostly a prefix is visible, so that a result is computed and not copied from further right.

That gives a handful of lessons per example. With two streams (block diffusion, arXiv 2503.09573) the answer is there
once in clear and once masked, cut into chunks of random size; the masks of a chunk see each other and all clear tokens
before the chunk, and every answer token is a lesson.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipe.examples import Example
from recipe.sizes import BLOCK
from recipe.vocabulary import EOS, MASK

Ints, Floats = NDArray[np.integer], NDArray[np.floating]
FRONTIER = 8  # masked tokens from the left that count in full
FAR = 0.4  # weight of those behind: they depend on what is not there yet
ENDS = 0.1  # weight of the end tokens behind the first
SHORT = 1.0  # from 0 to 1: how much less a long answer counts than its tokens; at 1 all answers count the same
GRAIN = 256
CHUNKS = (1, 1, 1, 2, 2, 3, 4, 6, 8, 12, 20)


class Lesson(NamedTuple):
    noisy: Ints  # [rows, length], with masks
    places: Ints  # [rows, length], positions in the canvas
    wanted: Ints  # [lessons], places in the flattened batch
    truth: Ints  # [lessons]
    weight: Floats  # [lessons]
    levels: Ints | None  # [rows, length], the chunk of each token if there are two streams; negative for masked ones


class Canvas(NamedTuple):
    """Rows of which one block each is masked, and all behind it; the net chooses what is unmasked (`rollout.py`)."""

    noisy: Ints  # [rows, length], with masks
    clean: Ints  # [rows, length]
    first: Ints  # [rows, 1], where the block begins
    end: Ints  # [rows, 1], where the answer ends, behind its end token


class Canvases(NamedTuple):
    ids: Ints  # [rows, width], prompt, answer, and ends behind
    start: Ints  # [rows, 1], where the answer begins
    end: Ints  # [rows, 1], where it ends, behind its end token


def canvases(group: list[Example], width: int) -> Canvases:
    ids = np.full((len(group), width), EOS)
    for row, example in enumerate(group):
        ids[row, : len(example.prompt) + len(example.answer)] = example.prompt + example.answer
    start = np.array([[len(example.prompt)] for example in group])
    return Canvases(ids, start, start + np.array([[len(example.answer)] for example in group]))


def lesson(noisy: Ints, clean: Ints, weight: Floats, places: Ints, levels: Ints | None) -> Lesson:
    """In small types, as it goes through a pipe; the lessons are filled up to a multiple of `GRAIN`, with no weight."""
    weight = (weight / weight.sum(1, keepdims=True) ** SHORT).ravel()
    (wanted,) = weight.nonzero()
    count = len(wanted)
    wanted = np.concatenate([wanted, np.zeros(-len(wanted) % GRAIN, dtype=wanted.dtype)])
    levels = None if levels is None else levels.astype(np.int16)
    noisy, places, truth = (part.astype(np.int16) for part in (noisy, places, clean.ravel()[wanted]))
    counts = np.where(np.arange(len(wanted)) < count, weight[wanted], 0.0).astype(np.float32)
    return Lesson(noisy, places, wanted.astype(np.int32), truth, counts, levels)


def two_streams(group: list[Example], length: int, rng: np.random.Generator) -> Lesson:
    """Rows of prompt, answer in clear, answer masked; the answer has one more end token."""
    ids, start, end = canvases(group, length)
    answer = end - start + 1
    middle, finish = start + answer, start + 2 * answer
    at = np.arange(length)[None]
    places = np.where(at < middle, at, np.where(at < finish, at - answer, 0))
    clean = np.take_along_axis(ids, places, 1)
    masked = (at >= middle) & (at < finish)
    size = rng.choice(CHUNKS, (len(group), 1))
    shifted = places - start + rng.integers(0, size)
    levels = np.where(at < start, 0, shifted // size + 1)
    levels = np.where(masked, -levels, np.where(at < finish, levels, 10_000))
    weight = np.where(masked, np.where(shifted % size < FRONTIER, 1.0, FAR), 0.0)
    weight[at == finish - 1] = ENDS
    return lesson(np.where(masked, MASK, clean), clean, weight, places, levels)


def as_decoded(group: list[Example], length: int, rng: np.random.Generator) -> Lesson:
    """One block of each row partly masked, and all behind it."""
    clean, start, end = canvases(group, length)
    rows, at = len(group), np.arange(length)[None]
    answer = end - start  # with its end token
    first = start + rng.integers(0, (answer - 1) // BLOCK + 1) * BLOCK
    last = np.minimum(first + BLOCK, length)
    body = np.minimum(last, end)  # behind what the block holds of the answer
    cut, chance = first + rng.integers(0, body - first), rng.random((rows, length))
    edge, shown, style = rng.integers(0, 11, (rows, 1)), rng.random((rows, 1)), rng.random((rows, 1))
    ragged = (at >= cut) & ((at >= cut + edge) | (chance > shown))
    masked = np.where(style < 0.3, True, np.where(style < 0.85, ragged, chance < shown))
    tail = rng.choice((0.0, 0.0, 1.0, 0.5), (rows, 1)) * rng.choice((1.0, rng.random()), (rows, 1))
    masked = np.where(at < end, masked, chance >= tail)
    masked &= (at >= first) & (at < last)
    masked &= ~((at == end - 1) & (tail == 1.0))  # the length is known already
    masked |= (at == body - 1) & ~masked.any(1, keepdims=True)
    weight = np.where(np.cumsum(masked, 1) <= FRONTIER, 1.0, FAR) * masked
    weight = np.where(at >= end, ENDS * masked, weight)
    return lesson(np.where(masked | (at >= last), MASK, clean), clean, weight, np.broadcast_to(at, clean.shape), None)


def to_be_decoded(group: list[Example], length: int, rng: np.random.Generator) -> Canvas:
    clean, start, end = canvases(group, length)
    first = start + rng.integers(0, (end - start - 1) // BLOCK + 1) * BLOCK
    noisy = np.where(np.arange(length)[None] >= first, MASK, clean)
    return Canvas(*(part.astype(np.int16) for part in (noisy, clean, first, end)))
