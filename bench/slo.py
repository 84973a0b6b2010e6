"""Deadlines met under load: this server and the usual ways, over real HTTP, same arrivals, one run side by side.

    python bench/slo.py [--loads .4,.6,.8,.85,1,1.3,2] [--scales 1.5,3,5,1.5+8] [--seeds 3] [--seconds 12] [--out DIR]
    python bench/slo.py --systems dilaserve --some-loads "" --loads .4 --seconds 75 [--rate RATE]

Every system is a configuration of the same server on the same devices, and all are up all the time. 1.0x is the load
at which first come, first served at threshold .9 saturates: what it finishes when everything waits at once, which takes
seconds and is nearer the truth than looking for the rate at which waiting begins to grow. A request's deadline is a
multiple of the unloaded latency of its class at .9 (its task and the number of operations in it), measured first: twice
it at every load, and `--scales` at `--some-loads` with one seed, and there also one deadline for a whole task. Whatever
was not answered in time counts as missed, declined requests too. The requests are of tasks that take several steps, as
those of large models do (`--tasks`); at `--some-loads` there is also one table of all tasks, most of which are done in
a step or two, where nobody can decide much.

Accuracy is paired: every problem that was asked is also asked alone at .9, and the drop is the difference on the same
problems. Each run is a tenant of its own, so that no run lives on the accuracy budget of another. The clients run in
this process, so they and the servers share the machine.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from replay import (
    MAX_TOKENS,
    PATIENCE,
    UNHURRIED,
    Fate,
    Spent,
    Traffic,
    asks,
    chat,
    replay,
    saturation,
    server,
    spent,
    unloaded_latency,
)
from rich.console import Console
from rich.progress import Progress, track

from dilaserve import Config, Engine, Options
from dilaserve.calibrate.calibrate import machine
from dilaserve.profile.problems import TASKS, Problem, check
from dilaserve.sim.workload import ARRIVALS
from dilaserve.types import OnMiss

CONSOLE = Console(stderr=True)
FIXED = ("--threshold-control", "fixed")
PLAIN = (*FIXED, "--shed", "off")
EDF = ("--scheduling", "edf", *FIXED, "--confidence-threshold", "0.8", "--batch-cap")
CAREFUL = ("--scheduling", "edf", *FIXED, "--batch-cap")
BEST_EFFORT = "dilaserve best effort"  # its requests say nothing of missed deadlines: they are answered late
SYSTEMS: dict[str, tuple[str, ...]] = {
    "fcfs .9": ("--scheduling", "fcfs", *PLAIN),
    "fcfs .8": ("--scheduling", "fcfs", *PLAIN, "--confidence-threshold", "0.8"),
    "fcfs .7": ("--scheduling", "fcfs", *PLAIN, "--confidence-threshold", "0.7"),
    "edf+shed .8": (*EDF, "2"),
    "edf+shed .9": (*CAREFUL, "2"),
    "dilaserve": (),
    BEST_EFFORT: (),
}
ABLATIONS: dict[str, tuple[str, ...]] = {
    "edf": ("--scheduling", "edf", *PLAIN),
    "least slack": ("--scheduling", "least-slack", *PLAIN),
    "thresholds only": ("--scheduling", "fcfs", "--shed", "off"),
    "composed only": ("--scheduling", "composed", *FIXED),
}
CAPS = ("2", "3", "4", "8")  # the free knob of EDF, tuned on other arrivals
TWICE = "2"
EVERYTHING = "2 (all tasks)"
PER_TASK = "2 (one deadline a task)"
TUNING_SEED, WARM_UP_SEED = 40, 50


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


class Found(NamedTuple):
    rate: float
    unloaded: dict[str, float]
    cap: str
    fates: dict[Key, list[list[Fate]]]
    wasted: dict[Key, list[float]]
    reference: dict[Problem, bool]

    def cell(self, key: Key) -> Cell:
        return cell(self.fates[key], self.wasted[key], self.reference)


class Load(NamedTuple):
    """One round: the same arrivals for every system."""

    mix: str
    load: float
    seed: int
    systems: tuple[str, ...]


def rounds(args: argparse.Namespace) -> list[Load]:
    main = args.systems
    plan = [Load(TWICE, load, seed, main) for load in args.loads for seed in range(args.seeds)]
    plan += [Load(mix, load, 0, main) for mix in (*args.scales, PER_TASK, EVERYTHING) for load in args.some_loads]
    return plan + [Load(TWICE, load, 0, tuple(ABLATIONS)) for load in args.some_loads]


async def measure(args: argparse.Namespace) -> Found:
    traffic = Traffic(args.tasks, args.arrivals, args.trace)
    plan = rounds(args)
    async with contextlib.AsyncExitStack() as stack:

        async def up(flags: Sequence[str]) -> str:
            return await stack.enter_async_context(server(flags, args.devices, args.model))

        addresses = {"fcfs .9": await up((*SYSTEMS["fcfs .9"], *singles(args.devices)))}
        unloaded = await unloaded_latency(addresses["fcfs .9"], args.unloaded)
        rate = args.rate or await saturation(addresses["fcfs .9"], traffic, unloaded, args.flood)
        shown = json.dumps({task: round(seconds, 4) for task, seconds in unloaded.items()})
        CONSOLE.print(f"1.0x = {rate:.1f} requests/s; unloaded {shown}")
        edf = any(system.startswith("edf+shed") for system in args.systems)
        cap = await tuned(args, traffic, rate, unloaded) if edf else ""
        capped = {"edf+shed .8": (*EDF, cap), "edf+shed .9": (*CAREFUL, cap)} if cap else {}
        flags = {**SYSTEMS, **ABLATIONS, **capped}
        flags = {name: (*each, *singles(args.devices)) if each else each for name, each in flags.items()}
        wanted = {system for step in plan for system in step.systems}
        for system in flags:
            if system in wanted and system not in addresses:
                addresses[system] = await up(flags[system])
        for address in addresses.values():
            await replay(address, asks(traffic, rate / 2, [UNHURRIED], WARM_UP_SEED, 3.0), unloaded)
        found = Found(rate, unloaded, cap, {}, {}, {})
        with Progress(console=CONSOLE) as bar:
            task = bar.add_task("runs", total=sum(len(step.systems) for step in plan))
            for step in plan:
                await run(step, args, traffic, addresses, found)
                bar.advance(task, len(step.systems))
    everything = {fate.ask.problem for runs in found.fates.values() for fates in runs for fate in fates}
    return found._replace(reference=await alone(args, sorted(everything)))


async def run(step: Load, args: argparse.Namespace, traffic: Traffic, addresses: dict[str, str], found: Found) -> None:
    """One round; another system goes first each time."""
    rate = found.rate
    if step.mix == EVERYTHING:
        traffic, rate = traffic._replace(tasks=tuple(TASKS)), rate * heaviness(found.unloaded, traffic.tasks)
    unloaded = found.unloaded if step.mix != PER_TASK else alike(found.unloaded)
    scales = tuple(map(float, step.mix.split()[0].split("+")))
    wanted = asks(traffic, step.load * rate, scales, step.seed, args.seconds)
    first = (step.seed + round(10 * step.load)) % len(step.systems)
    for system in (*step.systems[first:], *step.systems[:first]):
        address, key = addresses[system], Key(step.mix, system, step.load)
        before = await spent(address)
        on_miss: OnMiss = "best_effort" if system == BEST_EFFORT else "cancel_when_late"
        fates = await replay(address, wanted, unloaded, PATIENCE, f"{step.mix} {step.load} {step.seed}", on_miss)
        found.fates.setdefault(key, []).append(fates)
        found.wasted.setdefault(key, []).append(share(before, await spent(address)))


def heaviness(unloaded: dict[str, float], tasks: Sequence[str]) -> float:
    """How many requests of all tasks take as long as one of these, alone."""
    means = by_task(unloaded)
    return statistics.fmean(means[task] for task in tasks) / statistics.fmean(means.values())


def by_task(unloaded: dict[str, float]) -> dict[str, float]:
    """The mean over the classes of each task, which are drawn equally often."""
    found: dict[str, list[float]] = {}
    for name, seconds in unloaded.items():
        found.setdefault(name.split()[0], []).append(seconds)
    return {task: statistics.fmean(times) for task, times in found.items()}


def alike(unloaded: dict[str, float]) -> dict[str, float]:
    """What a request of a class would take if it were like all of its task."""
    means = by_task(unloaded)
    return {name: means[name.split()[0]] for name in unloaded}


def singles(devices: str) -> tuple[str, str]:
    """The plan of everybody but this server, which plans for itself: every device on its own."""
    return "--plan", f"{len(devices.split(','))}x1"


def share(before: Spent, after: Spent) -> float:
    return (after.wasted - before.wasted) / max(1e-9, after.device - before.device)


async def tuned(args: argparse.Namespace, traffic: Traffic, rate: float, unloaded: dict[str, float]) -> str:
    """The batch cap at which EDF meets most deadlines at 1.0x, on arrivals that are not measured later."""
    met = {}
    for cap in CAPS:
        async with server((*EDF, cap, *singles(args.devices)), args.devices, args.model) as address:
            await replay(address, asks(traffic, rate / 2, [UNHURRIED], WARM_UP_SEED, 3.0), unloaded)
            fates = await replay(address, asks(traffic, rate, [2.0], TUNING_SEED, args.seconds), unloaded)
            met[cap] = sum(fate.met for fate in fates)
    return max(met, key=lambda cap: met[cap])


async def alone(args: argparse.Namespace, problems: Sequence[Problem]) -> dict[Problem, bool]:
    """Whether each problem is answered right at .9; no company changes an answer."""
    options = Options(max_tokens=MAX_TOKENS, confidence_threshold=0.9)
    config = Config.of(model=args.model, devices=args.devices, max_queue=len(problems))
    async with Engine(config) as engine:
        asked = [asyncio.create_task(engine.generate(chat(problem), options)) for problem in problems]
        answers = [await answer for answer in track(asked, "alone at .9", console=CONSOLE)]
    return {problem: check(problem, answer.text) for problem, answer in zip(problems, answers, strict=True)}


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


# what is printed


def printed(found: Found, args: argparse.Namespace) -> str:
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


def grid(found: Found, mix: str, shown) -> list[str]:  # type: ignore[no-untyped-def]
    loads = sorted({key.load for key in found.fates if key.mix == mix})
    lines = ["| system | " + " | ".join(f"{load:g}x" for load in loads) + " |", "|---" * (len(loads) + 1) + "|"]
    for system in (*SYSTEMS, *ABLATIONS):
        keys = [Key(mix, system, load) for load in loads]
        if any(key in found.fates for key in keys):
            cells = (shown(found.cell(key)) if key in found.fates else "" for key in keys)
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def drops_by_task(found: Found) -> str:
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


def goodput(found: Found, args: argparse.Namespace) -> str:
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


# what is drawn


def drawn(found: Found, args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    middle = min(args.loads, key=lambda load: abs(load - 1.0))
    for system in args.systems:
        cells = [found.cell(Key(TWICE, system, load)) for load in args.loads]
        style = {"linewidth": 2.4 if system == "dilaserve" else 1.1, "label": system}
        axes[0].plot(args.loads, [one.attainment for one in cells], marker="o", markersize=3, **style)
        axes[1].plot(args.loads, [one.accuracy for one in cells], marker="o", markersize=3, **style)
        fates = itertools.chain.from_iterable(found.fates[Key(TWICE, system, middle)])
        times = sorted(1000 * fate.latency for fate in fates if fate.latency is not None)
        axes[2].plot(times, [(i + 1) / len(times) for i in range(len(times))], **style)
    axes[0].set(xlabel="load", ylabel="deadlines met, %", ylim=(0, 101))
    axes[1].set(xlabel="load", ylabel="accuracy of answers, %")
    axes[2].set(xlabel=f"latency at {middle:g}x, ms", ylabel="share of answers", xscale="log")
    axes[0].legend(frameon=False, fontsize=7)
    for one in axes:
        one.grid(alpha=0.25)
    figure.savefig(args.out / "slo.png", dpi=150)
    plt.close(figure)
    from dilaserve.profile import plots

    system = "dilaserve" if "dilaserve" in args.systems else args.systems[0]
    fates = found.fates[Key(TWICE, system, middle)][0]
    plots.timeline(list(by_second(fates, args.seconds)), f"{system} at {middle:g}x", args.out / "slo-timeline.png")


def by_second(fates: Sequence[Fate], seconds: float) -> Iterator[tuple[float, float, int, int, float, float]]:
    """By half second: arrivals a second, nobody knows who waits, in the house, mean threshold, share met."""
    threshold, met = 0.9, 1.0
    for tick in range(int(2 * seconds)):
        now = tick / 2
        inside = [f for f in fates if f.ask.at <= now < f.ask.at + (f.latency or 0.0)]
        near = [f for f in fates if now - 1.0 <= f.ask.at < now + 1.0]
        threshold = statistics.fmean([f.threshold for f in near if f.latency is not None] or [threshold])
        met = statistics.fmean([float(f.met) for f in near] or [met])
        yield now, len(near) / 2, 0, len(inside), threshold, met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",") if part]  # noqa: E731
    systems = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--devices", default=",".join(["cpu"] * (os.cpu_count() or 1)))
    parser.add_argument("--loads", type=numbers, default=[0.4, 0.6, 0.8, 0.85, 1.0, 1.3, 2.0], help="with deadlines 2x")
    parser.add_argument("--scales", type=lambda text: text.split(","), default=["1.5", "3", "5", "1.5+8"])
    parser.add_argument("--some-loads", type=numbers, default=[0.8, 1.0], help="with the other deadlines")
    parser.add_argument("--systems", type=systems, default=tuple(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=("chain", "word"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--unloaded", type=int, default=15, help="requests a task for the unloaded latency")
    parser.add_argument("--flood", type=int, default=500, help="requests at once that 1.0x is measured with")
    parser.add_argument("--rate", type=float, help="requests a second at 1.0x, instead of looking for it")
    parser.add_argument("--arrivals", choices=ARRIVALS, default="poisson")
    parser.add_argument("--trace", type=Path, help="CSV of arrival_s,prompt_tokens,output_tokens; only times are used")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"--systems: {', '.join(sorted(unknown))} is none of {', '.join(SYSTEMS)}")
    if not args.loads:
        parser.error("--loads: at least one")
    found = asyncio.run(measure(args))
    text = printed(found, args)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "slo.md").write_text(text)
    drawn(found, args)


if __name__ == "__main__":
    main()
