"""Deadlines met under load: this server and the usual ways, over real HTTP, same arrivals, one run side by side.

    python bench/slo.py [--loads .6,.8,1,1.3,2] [--scales 2] [--seeds 3] [--seconds 30] [--systems ...] [--out DIR]

Every system is a configuration of the same server on the same devices. 1.0x is the load at which first come, first
served at threshold .9 saturates, found by doubling and bisection. A request's deadline is a multiple of the unloaded
latency of its task at .9, measured first. Whatever was not answered in time counts as missed, declined requests too;
accuracy is over all answers. The clients run in this process, so they and the server share the machine.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
from rich.console import Console
from rich.progress import Progress

from dilaserve.sim.workload import ARRIVALS, arrivals, scaled, trace
from dilaserve.tasks import TASKS, Problem, check, held_out

CONSOLE = Console(stderr=True)
FIXED = ("--threshold-control", "fixed")
PLAIN = (*FIXED, "--shed", "off")
SYSTEMS: dict[str, tuple[str, ...]] = {
    "fcfs .9": ("--scheduling", "fcfs", *PLAIN),
    "fcfs .8": ("--scheduling", "fcfs", *PLAIN, "--confidence-threshold", "0.8"),
    "fcfs .7": ("--scheduling", "fcfs", *PLAIN, "--confidence-threshold", "0.7"),
    "edf": ("--scheduling", "edf", *PLAIN),
    "least slack": ("--scheduling", "least-slack", *PLAIN),
    "edf+shed .8": ("--scheduling", "edf", *FIXED, "--confidence-threshold", "0.8", "--batch-cap", "2"),
    "thresholds only": ("--scheduling", "fcfs", "--shed", "off"),
    "composed only": ("--scheduling", "composed", *FIXED),
    "dilaserve": (),
}
MAX_TOKENS = 96
UNHURRIED = 1000.0  # a deadline that nobody misses
PATIENCE = 60.0  # seconds after the last arrival until what is still open counts as unanswered


class Ask(NamedTuple):
    at: float
    problem: Problem
    scale: float


class Fate(NamedTuple):
    ask: Ask
    latency: float | None  # None: declined or never answered
    met: bool
    right: bool
    drop: float
    threshold: float


class Cell(NamedTuple):
    """One system at one load, over its seeds."""

    attainment: float
    accuracy: float
    drop: float
    latency: float
    p99: float
    shed: float
    threshold: float
    wasted: float


@contextlib.asynccontextmanager
async def server(flags: Sequence[str], devices: str, model: str) -> AsyncIterator[str]:
    """A server process of its own; gives its address."""
    command = [sys.executable, "-m", "dilaserve", "--model", model, "--port", "0", "--devices", devices]
    process = await asyncio.create_subprocess_exec(
        *command, "--log-level", "warning", "--max-queue", "4096", *flags, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        line = (await process.stdout.readline()).decode()
        yield line.split(" on ")[1].split()[0]
    finally:
        process.terminate()
        await process.wait()


async def one(session: aiohttp.ClientSession, ask: Ask, unloaded: dict[str, float], began: float) -> Fate:
    """Ask one problem at its time."""
    await asyncio.sleep(max(0.0, began + ask.at - time.perf_counter()))
    deadline = ask.scale * unloaded[ask.problem.task]
    slo = {"deadline_ms": 1000 * deadline, "task": ask.problem.task, "on_miss": "cancel_when_late"}
    sent = time.perf_counter()
    body = {"messages": [{"role": "user", "content": ask.problem.prompt}], "max_tokens": MAX_TOKENS, "slo": slo}
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            answer = await response.json()
            status = response.status
    except (TimeoutError, aiohttp.ClientError):
        return Fate(ask, None, False, False, 0.0, 0.0)
    latency = time.perf_counter() - sent
    if status != 200:
        return Fate(ask, None, False, False, 0.0, 0.0)
    fate, text = answer["dilaserve"], answer["choices"][0]["message"]["content"]
    right = check(ask.problem, text)
    return Fate(ask, latency, latency <= deadline, right, fate["expected_accuracy_drop"], fate["mean_threshold"])


async def replay(address: str, asks: Sequence[Ask], unloaded: dict[str, float], patience: float) -> list[Fate]:
    timeout = aiohttp.ClientTimeout(total=patience)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as session:
        began = time.perf_counter()
        return list(await asyncio.gather(*(one(session, ask, unloaded, began) for ask in asks)))


def asks(args: argparse.Namespace, rate: float, scales: Sequence[float], seed: int, seconds: float) -> list[Ask]:
    """Problems of all tasks at random, at the arrival times of the trace or the process."""
    rng = random.Random(f"{seed} {rate:.4f}")
    if args.trace:
        times = (at for at, _, _ in scaled(trace(args.trace), rate, start=0.1 * seed))
    else:
        times = arrivals(args.arrivals, rate, rng)
    pools = {task: itertools.cycle(held_out(task, 400, seed=seed + 1)) for task in TASKS}
    names = list(TASKS)
    found = itertools.takewhile(lambda at: at < seconds, times)
    return [Ask(at, next(pools[rng.choice(names)]), rng.choice(scales)) for at in found]


async def unloaded_latency(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one request alone, by task, at the reference threshold."""
    async with server(SYSTEMS["fcfs .9"], args.devices, args.model) as address:
        for problem in (problem for task in TASKS for problem in held_out(task, 5, seed=98)):  # warm up
            await replay(address, [Ask(0.0, problem, UNHURRIED)], {problem.task: 1.0}, PATIENCE)
        found = {}
        for task in TASKS:
            problems = held_out(task, args.unloaded, seed=99)
            fates = []
            for problem in problems:
                fates += await replay(address, [Ask(0.0, problem, UNHURRIED)], {task: 1.0}, PATIENCE)
            found[task] = statistics.median(fate.latency for fate in fates if fate.latency is not None)
    return found


async def keeps_up(args: argparse.Namespace, address: str, rate: float, unloaded: dict[str, float]) -> bool:
    """Whether requests of the last third wait no longer than twice those of the first."""
    fates = await replay(address, asks(args, rate, [UNHURRIED], 7, args.knee_seconds), unloaded, 10 * PATIENCE)
    third = args.knee_seconds / 3
    early = [fate.latency or 0.0 for fate in fates if fate.ask.at < third]
    late = [fate.latency or 0.0 for fate in fates if fate.ask.at > 2 * third]
    return statistics.fmean(late) < max(2 * statistics.fmean(early), 4 * statistics.fmean(unloaded.values()))


async def knee(args: argparse.Namespace, unloaded: dict[str, float]) -> float:
    """The rate at which FCFS .9 saturates: doubling, then bisection to 5 %."""
    low = 0.5 / statistics.fmean(unloaded.values())
    async with server(SYSTEMS["fcfs .9"], args.devices, args.model) as address:
        high = 2 * low
        while await keeps_up(args, address, high, unloaded):
            low, high = high, 2 * high
        while high / low > 1.05:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if await keeps_up(args, address, middle, unloaded) else (low, middle)
    return low


async def measure(args: argparse.Namespace) -> dict[str, object]:
    unloaded = await unloaded_latency(args)
    rate = args.rate or await knee(args, unloaded)
    CONSOLE.print(
        f"1.0x = {rate:.1f} requests/s; unloaded " + json.dumps({k: round(v, 4) for k, v in unloaded.items()})
    )
    fates: dict[tuple[str, str, float], list[list[Fate]]] = {}
    wasted: dict[tuple[str, str, float], list[float]] = {}
    mixes = {mix: tuple(map(float, mix.split("+"))) for mix in args.scales}
    with Progress(console=CONSOLE) as bar:
        shown = bar.add_task("runs", total=len(mixes) * len(args.loads) * args.seeds * len(args.systems))
        for (mix, scales), load, seed in itertools.product(mixes.items(), args.loads, range(args.seeds)):
            wanted = asks(args, load * rate, scales, seed, args.seconds)
            for system in turned(args.systems, seed):
                async with server(SYSTEMS[system], args.devices, args.model) as address:
                    await replay(address, asks(args, rate / 2, [UNHURRIED], 50, 3.0), unloaded, PATIENCE)  # warm up
                    got = await replay(address, wanted, unloaded, PATIENCE)
                    wasted.setdefault((mix, system, load), []).append(await waste(address))
                fates.setdefault((mix, system, load), []).append(got)
                bar.advance(shown)
    cells = {key: cell(runs, wasted[key]) for key, runs in fates.items()}
    return {"rate": rate, "unloaded": unloaded, "cells": cells, "fates": fates}


def turned(systems: Sequence[str], seed: int) -> Iterator[str]:
    """Another system goes first each round."""
    return itertools.islice(itertools.cycle(systems), seed, seed + len(systems))


async def waste(address: str) -> float:
    """Share of device time that went to requests which missed, by the server's own count."""
    async with aiohttp.ClientSession(address) as session, session.get("/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines() if not line.startswith("#"))
    total = float(lines["dilaserve_device_seconds_total"])
    return float(lines["dilaserve_wasted_seconds_total"]) / total if total else 0.0


def cell(runs: Sequence[Sequence[Fate]], wasted: Sequence[float]) -> Cell:
    everything = [fate for run in runs for fate in run]
    served = [fate for fate in everything if fate.latency is not None]
    latencies = sorted(fate.latency for fate in served if fate.latency is not None) or [0.0]
    return Cell(
        attainment=100 * sum(fate.met for fate in everything) / len(everything),
        accuracy=100 * sum(fate.right for fate in served) / max(1, len(served)),
        drop=statistics.fmean([fate.drop for fate in served] or [0.0]),
        latency=statistics.fmean(latencies),
        p99=latencies[int(0.99 * (len(latencies) - 1))],
        shed=100 * (1 - len(served) / len(everything)),
        threshold=statistics.fmean([fate.threshold for fate in served] or [0.0]),
        wasted=statistics.fmean(wasted),
    )


def printed(found: dict[str, object], args: argparse.Namespace) -> str:
    cells: dict[tuple[str, str, float], Cell] = found["cells"]  # type: ignore[assignment]
    lines = [f"1.0x = {found['rate']:.1f} requests/s, {platform.processor() or platform.machine()}, {args.devices}", ""]
    for mix in args.scales:
        lines += [f"Deadlines {mix.replace('+', 'x and ')}x the unloaded latency: % met (accuracy %, wasted share)", ""]
        lines += ["| system | " + " | ".join(f"{load:g}x" for load in args.loads) + " |"]
        lines += ["|---" * (len(args.loads) + 1) + "|"]
        for system in args.systems:
            row = [cells[mix, system, load] for load in args.loads]
            shown = (f"{c.attainment:.1f} ({c.accuracy:.1f}, {c.wasted:.2f})" for c in row)
            lines.append(f"| {system} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def drawn(found: dict[str, object], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells: dict[tuple[str, str, float], Cell] = found["cells"]  # type: ignore[assignment]
    fates: dict[tuple[str, str, float], list[list[Fate]]] = found["fates"]  # type: ignore[assignment]
    for mix in args.scales:
        figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
        for system in args.systems:
            strong = {
                "linewidth": 2.4 if system == "dilaserve" else 1.1,
                "marker": "o",
                "markersize": 3,
                "label": system,
            }
            axes[0].plot(args.loads, [cells[mix, system, load].attainment for load in args.loads], **strong)
            axes[1].plot(args.loads, [cells[mix, system, load].accuracy for load in args.loads], **strong)
            middle = min(args.loads, key=lambda load: abs(load - 1.0))
            times = sorted(f.latency for run in fates[mix, system, middle] for f in run if f.latency is not None)
            shares = [(i + 1) / max(1, len(times)) for i in range(len(times))]
            axes[2].plot(times, shares, linewidth=strong["linewidth"])
        axes[0].set(xlabel="load", ylabel="deadlines met, %", ylim=(0, 101))
        axes[1].set(xlabel="load", ylabel="accuracy of answers, %")
        axes[2].set(xlabel=f"latency at {middle:g}x, s", ylabel="share of answers", xscale="log")
        axes[0].legend(frameon=False, fontsize=7)
        for one_axes in axes:
            one_axes.grid(alpha=0.25)
        figure.savefig(args.out / f"slo-{mix}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--devices", default=",".join(["cpu"] * (os.cpu_count() or 1)))
    parser.add_argument("--loads", type=numbers, default=[0.6, 0.8, 1.0, 1.3, 2.0])
    parser.add_argument("--scales", type=lambda text: text.split(","), default=["2"], help="e.g. 1.5,2,3,5,1.5+8")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--unloaded", type=int, default=15, help="requests a task for the unloaded latency")
    parser.add_argument("--knee-seconds", type=float, default=15.0)
    parser.add_argument("--rate", type=float, help="requests a second at 1.0x, instead of looking for it")
    parser.add_argument("--arrivals", choices=ARRIVALS, default="poisson")
    parser.add_argument("--trace", type=Path, help="CSV of arrival_s,prompt_tokens,output_tokens; only times are used")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    found = asyncio.run(measure(args))
    text = printed(found, args)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "slo.md").write_text(text)
    drawn(found, args)


if __name__ == "__main__":
    main()
