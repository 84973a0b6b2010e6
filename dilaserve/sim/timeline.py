"""A run by the second: what arrived, waited and ran, and how it was served. Drawn as a PNG."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from dilaserve.profile import plots
from dilaserve.sim.run import Outcome, Run

WINDOW = 5.0  # seconds of arrivals that a rate, a share or a latency is taken over


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One second. Rates are requests a second; `met` and what else is known of recent arrivals is NaN where nothing is.

    `devices` counts the devices in instances of each tensor-parallel degree.
    """

    second: float
    arrivals: float
    declined: float
    waiting: int
    running: int
    threshold: float
    met: float
    mean_latency: float
    p95_latency: float
    devices: dict[int, int]


def moments(run: Run, seconds: float, window: float = WINDOW) -> list[Moment]:
    """A `Moment` for each second, over the arrivals of the `window` seconds before it.

    Rates and shares are NaN where that window is not whole: at the start, and after arrivals have ended at `seconds`.
    """
    found = []
    for noted in run.timeline:
        whole = window <= noted.second <= seconds
        recent = [one for one in run.outcomes if noted.second - window <= one.at < noted.second] if whole else []
        latencies = sorted(one.latency for one in recent if one.latency is not None)
        timed = [bool(one.met) for one in recent if one.scale is not None]
        found.append(
            Moment(
                second=noted.second,
                arrivals=len(recent) / window if whole else math.nan,
                declined=sum(map(declined, recent)) / window if whole else math.nan,
                waiting=noted.waiting,
                running=noted.running,
                threshold=noted.threshold,
                met=mean(timed),
                mean_latency=mean(latencies),
                p95_latency=p95(latencies),
                devices=noted.devices,
            )
        )
    return found


def declined(outcome: Outcome) -> bool:
    return outcome.latency is None


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.fmean(listed) if listed else math.nan


def p95(ordered: Sequence[float]) -> float:
    return ordered[int(0.95 * (len(ordered) - 1))] if ordered else math.nan


def draw(rows: Sequence[Moment], title: str, file: Path) -> None:
    """Panels over time: rates, requests, latency, deadlines, threshold, and the plan where it is known."""
    degrees = sorted({degree for row in rows for degree in row.devices})
    figure, axes = plots.panels(6 if degrees else 5, title)
    seconds = [row.second for row in rows]
    line = {"linewidth": 1.2}
    axes[0].plot(seconds, [row.arrivals for row in rows], label="arrivals", **line)
    axes[0].plot(seconds, [row.declined for row in rows], label="declined", color="tab:red", **line)
    axes[0].set(ylabel="requests/s", ylim=(0, None))
    axes[1].stackplot(
        seconds,
        [row.running for row in rows],
        [row.waiting for row in rows],
        labels=("running", "waiting"),
        alpha=0.8,
    )
    axes[1].set(ylabel="requests")
    axes[2].plot(seconds, [row.mean_latency for row in rows], label="mean", **line)
    axes[2].plot(seconds, [row.p95_latency for row in rows], label="95th percentile", **line)
    axes[2].set(ylabel="latency, s", ylim=(0, None))
    axes[3].plot(seconds, [100 * row.met for row in rows], **line)
    axes[3].set(ylabel="deadlines met, %", ylim=(-3, 103))
    axes[4].plot(seconds, [row.threshold for row in rows], **line)
    axes[4].set(ylabel="mean threshold", ylim=(0.55, 0.95))
    if degrees:
        counts = [[row.devices.get(degree, 0) for row in rows] for degree in degrees]
        axes[5].stackplot(seconds, counts, labels=[f"degree {degree}" for degree in degrees], step="post", alpha=0.8)
        axes[5].set(ylabel="devices")
    axes[-1].set(xlabel="seconds")
    for one in axes:
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    plots.saved(figure, file)
