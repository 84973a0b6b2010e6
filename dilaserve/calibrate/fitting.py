"""Fits of what was measured: drops that never fall with the level, and groups of prompts of like lengths."""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from scipy.optimize import isotonic_regression

ROUNDING = 1e-12  # of a sum of squares, that is no difference


def isotonic(drops: Sequence[float]) -> tuple[float, ...]:
    """The nearest values (least squares) that start at 0 and never fall."""
    fitted = isotonic_regression(drops).x
    return (0.0, *(max(0.0, float(value)) for value in fitted[1:]))


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
