"""Statistics of runs: deadlines met, accuracy and latency of one system at one load, over its seeds."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from replay import Fate

from dilaserve.profile.problems import Problem


class Key(NamedTuple):
    """One cell: deadlines, system, load."""

    mix: str
    system: str
    load: float


class Cell(NamedTuple):
    """One system at one load under one mix of deadlines, over its seeds; percent, points and seconds."""

    attainment: float
    accuracy: float
    drop: float  # paired, against .9
    drop_error: float  # half of its 95 % interval
    reported: float  # what the responses said
    latency: float
    p99: float
    shed: float
    threshold: float
    wasted: float
    answered: int
    useful: float  # right and on time, of all that arrived


class Measurements(NamedTuple):
    rate: float
    unloaded: dict[str, float]
    cap: str
    fates: dict[Key, list[list[Fate]]]
    wasted: dict[Key, list[float]]
    reference: dict[Problem, bool]

    def cell(self, key: Key) -> Cell:
        return cell(self.fates[key], self.wasted[key], self.reference)

    def by_seed(self, key: Key) -> list[Cell]:
        """The cell of each seed by itself."""
        runs = zip(self.fates[key], self.wasted[key], strict=True)
        return [cell([fates], [wasted], self.reference) for fates, wasted in runs]


def cell(runs: Sequence[Sequence[Fate]], wasted: Sequence[float], reference: dict[Problem, bool]) -> Cell:
    everything = [fate for run in runs for fate in run]
    served = [fate for fate in everything if fate.latency is not None]
    latencies = sorted(fate.latency for fate in served if fate.latency is not None) or [0.0]
    drop, error = paired(served, reference)
    return Cell(
        attainment=100 * sum(fate.met for fate in everything) / len(everything),
        accuracy=100 * sum(fate.right for fate in served) / max(1, len(served)),
        drop=drop,
        drop_error=error,
        reported=statistics.fmean([fate.drop for fate in served] or [0.0]),
        latency=statistics.fmean(latencies),
        p99=latencies[int(0.99 * (len(latencies) - 1))],
        shed=100 * (1 - len(served) / len(everything)),
        threshold=statistics.fmean([fate.threshold for fate in served] or [0.0]),
        wasted=statistics.fmean(wasted),
        answered=len(served),
        useful=100 * sum(fate.met and fate.right for fate in everything) / len(everything),
    )


def paired(served: Sequence[Fate], reference: dict[Problem, bool]) -> tuple[float, float]:
    """Points lost against .9 on the same problems, and half of the 95 % interval; a problem asked twice tells once."""
    lost: dict[Problem, list[float]] = {}
    for fate in served:
        lost.setdefault(fate.ask.problem, []).append(100.0 * (reference[fate.ask.problem] - fate.right))
    if len(lost) < 2:
        return 0.0, math.inf
    mean = statistics.fmean(itertools.chain.from_iterable(lost.values()))
    away = sum(sum(one - mean for one in same) ** 2 for same in lost.values())
    return mean, 1.96 * math.sqrt(away) / len(served)
