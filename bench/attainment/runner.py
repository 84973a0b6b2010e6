"""Runs the load: the same arrivals for every system, over real HTTP, and the same problems alone for reference."""

import argparse
import asyncio
import contextlib
import json
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from replay import (
    MAX_TOKENS,
    PATIENCE,
    UNHURRIED,
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

from attainment.cells import Key, Measurements
from attainment.systems import ABLATIONS, BEST_EFFORT, CAREFUL, EDF, SYSTEMS, singles
from dilaserve import Config, Engine, Options
from dilaserve.profile.problems import TASKS, Problem, check
from dilaserve.types import OnMiss

CONSOLE = Console(stderr=True)
CAPS = ("2", "3", "4", "8")  # the free knob of EDF, tuned on other arrivals
TWICE = "2"
EVERYTHING = "2 (all tasks)"
PER_TASK = "2 (one deadline a task)"
TUNING_SEED, WARM_UP_SEED = 40, 50


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


async def measure(args: argparse.Namespace) -> Measurements:
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
        found = Measurements(rate, unloaded, cap, {}, {}, {})
        with Progress(console=CONSOLE) as bar:
            task = bar.add_task("runs", total=sum(len(step.systems) for step in plan))
            for step in plan:
                await run(step, args, traffic, addresses, found)
                bar.advance(task, len(step.systems))
    everything = {fate.ask.problem for runs in found.fates.values() for fates in runs for fate in fates}
    return found._replace(reference=await alone(args, sorted(everything)))


async def run(
    step: Load, args: argparse.Namespace, traffic: Traffic, addresses: dict[str, str], found: Measurements
) -> None:
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
    """Whether each problem is answered right at .9; other requests do not change an answer."""
    options = Options(max_tokens=MAX_TOKENS, confidence_threshold=0.9)
    config = Config.of(model=args.model, devices=args.devices, max_queue=len(problems))
    async with Engine(config) as engine:
        asked = [asyncio.create_task(engine.generate(chat(problem), options)) for problem in problems]
        answers = [await answer for answer in track(asked, "alone at .9", console=CONSOLE)]
    return {problem: check(problem, answer.text) for problem, answer in zip(problems, answers, strict=True)}
