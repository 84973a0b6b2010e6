"""A block as a Markov chain over its masks left: mean and variance of the steps that a request still needs."""

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

from dilaserve.profile.decode_speed import BINS, Law, bin_of, pooled

RARELY = 1e-4  # times that a text is expected to end in some blocks, below which an approximation is used


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
