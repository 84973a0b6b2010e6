"""Draws what was measured: all systems over all loads, and one run over time."""

import argparse
import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from replay import Fate

from attainment.cells import Key, Measurements
from attainment.runner import TWICE
from dilaserve.sim import timeline
from dilaserve.sim.timeline import Moment, mean, p95

WINDOW = 2.0  # seconds of arrivals that a rate or a share is taken over


def drawn(found: Measurements, args: argparse.Namespace) -> None:
    """Write `slo.png`, all systems side by side, and `slo-timeline.png`, one run of one system."""
    middle = min(args.loads, key=lambda load: abs(load - 1.0))
    comparison(found, args, middle)
    system = "dilaserve" if "dilaserve" in args.systems else args.systems[0]
    fates = found.fates[Key(TWICE, system, middle)][0]
    timeline.draw(moments(fates, args.seconds), f"{system} at {middle:g}x", args.out / "slo-timeline.png")


def comparison(found: Measurements, args: argparse.Namespace, middle: float) -> None:
    """Four panels: deadlines met, right and on time, accuracy, and the latencies at the load `middle`."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for system, colour in zip(args.systems, colours(len(args.systems)), strict=True):
        style = {"color": colour, "linewidth": 2.4 if system == "dilaserve" else 1.1, "label": system}
        for one, field in zip(axes.flat, ("attainment", "useful", "accuracy"), strict=False):
            over_loads(one, found, system, args.loads, field, style)
        fates = itertools.chain.from_iterable(found.fates[Key(TWICE, system, middle)])
        times = sorted(1000 * fate.latency for fate in fates if fate.latency is not None)
        axes.flat[3].plot(times, [100 * (i + 1) / len(times) for i in range(len(times))], **style)
    load = f"load (1.0 = {found.rate:.0f} requests/s)"
    of_arrivals = {"xlabel": load, "ylabel": "% of all arrivals", "ylim": (0, 101)}
    axes[0, 0].set(title="Answered by the deadline", **of_arrivals)
    axes[0, 1].set(title="Right and on time", **of_arrivals)
    axes[1, 0].set(title="Accuracy of the answers", xlabel=load, ylabel="% of the answers that are right")
    axes[1, 1].set(title=f"Latency at load {middle:g}", xlabel="latency, ms", ylabel="% of the answers", xscale="log")
    for one in axes.flat:
        one.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title(args))
    figure.savefig(args.out / "slo.png", dpi=150)
    plt.close(figure)


def over_loads(
    axes: Axes, found: Measurements, system: str, loads: Sequence[float], field: str, style: dict[str, Any]
) -> None:
    """A line through all seeds together, and a bar from the lowest seed to the highest one."""
    keys = [Key(TWICE, system, load) for load in loads]
    values = [getattr(found.cell(key), field) for key in keys]
    axes.plot(loads, values, marker="o", markersize=3, **style)
    seeds = [[getattr(one, field) for one in found.by_seed(key)] for key in keys]
    if any(len(each) > 1 for each in seeds):
        low, high = [min(each) for each in seeds], [max(each) for each in seeds]
        axes.vlines(loads, low, high, color=style["color"], linewidth=1.0, alpha=0.6)


def title(args: argparse.Namespace) -> str:
    about = args.trace.name if args.trace else f"{args.arrivals} arrivals"
    seeds = f"{args.seeds} seeds (bars: lowest to highest)" if args.seeds > 1 else "one seed"
    first = f"Deadlines of twice the unloaded latency; {about} of {' and '.join(args.tasks)} problems"
    return f"{first}\n{args.model} on {args.devices}; {args.seconds:g} s a run, {seeds}"


def colours(count: int) -> list[Any]:
    return [plt.get_cmap("tab10")(i % 10) for i in range(count)]


def moments(fates: Sequence[Fate], seconds: float) -> list[Moment]:
    """By half second, over the arrivals of a window around it; how many wait, a client does not know."""
    found = []
    for tick in range(int(2 * seconds) + 1):
        now = tick / 2
        whole = WINDOW / 2 <= now <= seconds - WINDOW / 2
        near = [fate for fate in fates if abs(fate.ask.at - now) <= WINDOW / 2] if whole else []
        latencies = sorted(fate.latency for fate in near if fate.latency is not None)
        found.append(
            Moment(
                second=now,
                arrivals=len(near) / WINDOW if whole else math.nan,
                declined=sum(fate.latency is None for fate in near) / WINDOW if whole else math.nan,
                waiting=0,
                running=sum(fate.ask.at <= now < fate.ask.at + (fate.latency or 0.0) for fate in fates),
                threshold=mean(fate.threshold for fate in near if fate.latency is not None),
                met=mean(float(fate.met) for fate in near),
                mean_latency=mean(latencies),
                p95_latency=p95(latencies),
                devices={},
            )
        )
    return found
