"""The tables that are printed and written."""

import argparse
import itertools
import shlex
import statistics
import sys
from collections.abc import Sequence

from replay import Fate

from attainment.cells import Key, Measurements, paired
from attainment.runner import TWICE
from attainment.systems import ABLATIONS, SYSTEMS
from dilaserve.calibrate.calibrate import machine


def printed(found: Measurements, args: argparse.Namespace) -> str:
    about = args.trace.name if args.trace else f"{args.arrivals} arrivals"
    unloaded = ", ".join(f"{task} {1000 * seconds:.0f}" for task, seconds in found.unloaded.items())
    lines = [
        f"{machine()}; {args.devices}; {about} of {' and '.join(args.tasks)}; 1.0x = {found.rate:.1f} requests/s; "
        f"{args.seconds:g} s a run",
        f"`python {shlex.join(sys.argv)}`",
        "",
        f"Unloaded latency at .9, ms: {unloaded}." + (f" EDF's batch cap, tuned: {found.cap}." if found.cap else ""),
        "",
    ]
    mixes = {key.mix: None for key in found.fates}
    for mix in mixes:
        number, _, about = mix.partition(" ")
        deadlines = f"Deadlines {number.replace('+', 'x and ')}x {about}".rstrip()
        lines += [f"**{deadlines}: % met (share of device time wasted)**", ""]
        lines += grid(found, mix, lambda c: f"{c.attainment:.1f} ({c.wasted:.2f})")
        lines += [f"**{deadlines}: % right and on time, of all that arrived**", ""]
        lines += grid(found, mix, lambda c: f"{c.useful:.1f}")
        lines += [f"**{deadlines}: mean latency of answers, ms (% without an answer)**", ""]
        lines += grid(found, mix, lambda c: f"{1000 * c.latency:.0f} ({c.shed:.0f})")
    lines += [
        "**Deadlines 2x: accuracy drop against .9 in points, paired (95 %); what responses reported; problems**",
        "",
    ]
    lines += grid(found, TWICE, lambda c: f"{c.drop:.2f} ± {c.drop_error:.2f}; {c.reported:.2f}; {c.answered}")
    lines += [drops_by_task(found), "", goodput(found, args), ""]
    return "\n".join(lines)


def grid(found: Measurements, mix: str, shown) -> list[str]:  # type: ignore[no-untyped-def]
    loads = sorted({key.load for key in found.fates if key.mix == mix})
    lines = ["| system | " + " | ".join(f"{load:g}x" for load in loads) + " |", "|---" * (len(loads) + 1) + "|"]
    for system in (*SYSTEMS, *ABLATIONS):
        keys = [Key(mix, system, load) for load in loads]
        if any(key in found.fates for key in keys):
            cells = (shown(found.cell(key)) if key in found.fates else "" for key in keys)
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def drops_by_task(found: Measurements) -> str:
    """Measured and reported drop of this server's answers, over all loads."""
    served: dict[str, list[Fate]] = {}
    for key, runs in found.fates.items():
        if key.system == "dilaserve":
            for fate in itertools.chain.from_iterable(runs):
                if fate.latency is not None:
                    served.setdefault(fate.ask.problem.task, []).append(fate)
    parts = []
    for task, fates in sorted(served.items()):
        drop, error = paired(fates, found.reference)
        told = statistics.fmean(fate.drop for fate in fates)
        parts.append(f"{task} {drop:.2f} ± {error:.2f} ({told:.2f} reported, {len(fates)})")
    return "Accuracy drop of dilaserve by task, all runs, in points: " + "; ".join(parts) + "."


def goodput(found: Measurements, args: argparse.Namespace) -> str:
    """The highest load with 90 % of deadlines met, between the loads that were run."""
    parts = []
    for system in args.systems:
        points = [(load, found.cell(Key(TWICE, system, load)).attainment) for load in args.loads]
        parts.append(f"{system} {crossing(points, 90.0)}")
    return "Goodput, the highest load with 90 % met: " + ", ".join(parts) + "."


def crossing(points: Sequence[tuple[float, float]], level: float) -> str:
    """Where a falling line first falls below `level`."""
    if points[0][1] < level:
        return f"below {points[0][0]:g}x"
    for (load, met), (next_load, next_met) in itertools.pairwise(points):
        if next_met < level:
            return f"{load + (next_load - load) * (met - level) / (met - next_met):.2f}x"
    return f"above {points[-1][0]:g}x"
