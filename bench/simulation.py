"""Deadlines met on pretended devices: the policies side by side at many loads, minutes of eight GPUs in seconds.

    python bench/simulation.py [--trace FILE] [--devices 8] [--loads .6,.8,1,1.3,2] [--scale 2] [--seconds 240]

The real engine and scheduler on a virtual clock, the same arrivals for every system; by default LLaDA-8B on eight
H200s, from data sheets. 1.0x is the throughput at which first come, first served at threshold .9 saturates: what it
finishes when everything waits from the start. Whatever was not answered in time counts as missed. A request is
cancelled when its deadline passes, but in the row "best effort", where it goes on.
"""

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

from attainment.systems import ABLATIONS, BEST_EFFORT, SYSTEMS
from replay import middle_rate
from rich.console import Console
from rich.progress import Progress

from dilaserve.cli import parsed
from dilaserve.config import Config
from dilaserve.profile.decode_speed import ANY
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.sim import workload
from dilaserve.sim.command import costs, prepared
from dilaserve.sim.report import Report, report
from dilaserve.sim.run import pretended, simulate
from dilaserve.sim.workload import Job
from dilaserve.types import OnMiss

EVERYBODY = {**SYSTEMS, **ABLATIONS}
LIMIT = 4096
WARM_UP = 0.1  # of the time, left out
CONSOLE = Console(stderr=True)


def system(name: str, scale: float, devices: int) -> Config:
    """The settings of one system, from the flags that a server takes; only this server plans its devices by itself."""
    flags = EVERYBODY[name]
    settings, _ = parsed([*flags, *(("--plan", f"{devices}x1") if flags else ())], "serve")
    return prepared(settings, ((scale, 1.0),))


def jobs(
    args: argparse.Namespace,
    rate: float,
    scale: float | None,
    seed: int,
    seconds: float,
    on_miss: OnMiss = "cancel_when_late",
) -> list[Job]:
    if args.trace:
        times = workload.scaled(workload.trace(args.trace), rate, start=0.1 * seed)
    else:
        each = workload.arrivals(args.arrivals, rate, random.Random(f"{seed} {rate:.4f}"))
        times = zip(each, itertools.repeat(args.prompt), itertools.repeat(args.answer), strict=False)
    return workload.jobs(times, seconds, LIMIT, (ANY,), ((scale, 1.0),), seed, on_miss)


def saturation(args: argparse.Namespace, profile: ModelProfile) -> float:
    """Requests a second that FCFS .9 finishes while more are waiting."""
    flood = [job._replace(at=0.001 * i) for i, job in enumerate(jobs(args, 10.0, None, 0, args.flood / 10.0))]
    run = simulate(system("fcfs .9", 1.0, args.devices), pretended(profile, args.devices, LIMIT), [ANY], flood)
    return middle_rate([outcome.at + outcome.latency for outcome in run.outcomes if outcome.latency is not None])


def shown(found: Sequence[Report]) -> str:
    """Over the seeds: % met, share of work wasted, mean expected drop."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    met = mean([100 * (one.attainment or 0.0) for one in found])
    return f"{met:.1f} ({mean([one.wasted for one in found]):.2f}, {mean([one.expected_drop for one in found]):.2f})"


def measure(args: argparse.Namespace) -> str:
    profile = costs(args.costs).profile
    rate = args.rate or saturation(args, profile)
    about = f"{args.trace.name}" if args.trace else f"{args.arrivals}, {args.prompt}+{args.answer} tokens"
    head = (
        f"{profile.model} on {args.devices} x {profile.machine}; {about}; deadlines {args.scale:g}x; {args.seconds:g} s"
    )
    lines = [f"{head}, {args.seeds} seeds; 1.0x = {rate:.2f} requests/s", "", "% met (wasted share, expected drop)", ""]
    lines += [
        "| system | " + " | ".join(f"{load:g}x" for load in args.loads) + " |",
        "|---" * (len(args.loads) + 1) + "|",
    ]
    began, simulated = time.perf_counter(), 0.0
    with Progress(console=CONSOLE) as bar:
        task = bar.add_task("runs", total=len(args.systems) * len(args.loads) * args.seeds)
        for name in args.systems:
            row = []
            for load in args.loads:
                found = []
                for seed in range(args.seeds):
                    on_miss: OnMiss = "best_effort" if name == BEST_EFFORT else "cancel_when_late"
                    todo = jobs(args, load * rate, args.scale, seed, args.seconds, on_miss)
                    assemble = pretended(profile, args.devices, LIMIT, seed=seed)
                    outcome = simulate(system(name, args.scale, args.devices), assemble, [ANY], todo)
                    found.append(report(outcome, args.seconds, WARM_UP))
                    simulated += args.seconds
                    bar.advance(task)
                row.append(shown(found))
            lines.append(f"| {name} | " + " | ".join(row) + " |")
            bar.console.print(lines[-1])
    took = time.perf_counter() - began
    return "\n".join([*lines, "", f"{simulated / took:.0f}x faster than real time, over all runs", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--costs", default="h200", help="h200, or a profile from `dilaserve calibrate`")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--trace", type=Path, help="CSV of arrival_s,prompt_tokens,output_tokens; .gz too")
    parser.add_argument("--arrivals", choices=workload.ARRIVALS, default="poisson")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--loads", type=numbers, default=[0.6, 0.8, 1.0, 1.3, 2.0])
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--flood", type=float, default=1500.0, help="requests to measure saturation with")
    parser.add_argument("--rate", type=float, help="requests a second at 1.0x, instead of measuring it")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(EVERYBODY))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    text = measure(args)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
