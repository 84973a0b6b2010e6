"""Seconds that a plan takes to find, and how long an asyncio loop stands still meanwhile.

    python bench/planning.py [--devices 8,64,512,4096] [--classes 1,3,6] [--repeat 50]

Each solve is of another mix of rates and deadlines, all with cold tables for the first and warm ones after it, as while
serving. The stall is how much later than wanted a loop's one-millisecond timer fires, while a thread solves, less what
it is late without any solving (the 99 % quantile): both are printed.
"""

import argparse
import asyncio
import hashlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dilaserve.planner.packing import groups
from dilaserve.planner.planner import Planner
from dilaserve.planner.process import PlannerProcess
from dilaserve.planner.program import Ground, PlanProgram
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import by_degree
from dilaserve.types import Demand, Flow, Plan

DEGREES = (1, 2, 4, 8)
FODDER = bytes(10**7)
PULSE = 0.001  # seconds between two beats of the loop that is watched


def demands(devices: int, classes: int, rng: random.Random) -> Iterator[Demand]:
    """Endless, at .1 to 1.5 times what data-parallel instances carry."""
    while True:
        rate = 5.5 * devices * rng.uniform(0.1, 1.5)
        flows = tuple(
            Flow(
                canvas_tokens=rng.choice([256, 512, 1024]),
                answer_tokens=256 if i % 2 else 128,
                tightness=rng.choice([0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, None]),
                rate=rate * rng.uniform(0.5, 1.5) / classes,
            )
            for i in range(classes)
        )
        ranks = tuple(range(devices))
        plan = Plan(tuple((rank,) for rank in ranks))
        yield Demand(seconds=5.0, flows=flows, backlog=0, plan=plan, ranks=ranks, degrees=DEGREES)


def solving(devices: int, classes: int, repeat: int, tick: Callable[[], None]) -> tuple[list[float], ...]:
    """Milliseconds of the program alone, tables given: by the clock, of the processor; and of making the tables."""
    profile = llada_8b_h200()
    planner = Planner(by_degree(profile.costs), profile.quality)
    ground = Ground(groups(range(devices), DEGREES), {1: devices})
    source = demands(devices, classes, random.Random(devices + classes))
    solved, worked, tabled = [], [], []
    for _ in range(repeat):
        demand = next(source)
        began = time.perf_counter()
        offered = [planner.offered(flow, demand, ground) for flow in demand.flows]
        middle, before = time.perf_counter(), time.process_time()
        PlanProgram(offered, ground, 0.1, 0.9).proposal()
        worked.append(1000 * (time.process_time() - before))
        solved.append(1000 * (time.perf_counter() - middle))
        tabled.append(1000 * (middle - began))
        tick()
    return solved, worked, tabled


async def lateness(seconds: float, busy: Callable[[], object] | None) -> list[float]:
    """Milliseconds by which each beat comes too late, while a thread is `busy` over and over."""
    loop, ends = asyncio.get_running_loop(), time.perf_counter() + seconds

    def work() -> None:
        while busy and time.perf_counter() < ends:
            busy()

    working = loop.run_in_executor(None, work)
    late = []
    while time.perf_counter() < ends:
        wanted = time.perf_counter() + PULSE
        await asyncio.sleep(PULSE)
        late.append(1000 * max(0.0, time.perf_counter() - wanted))
    await working
    return sorted(late)


def stalls(seconds: float, devices: int, classes: int) -> dict[str, list[float]]:
    profile = llada_8b_h200()
    laws = by_degree(profile.costs)
    ground = Ground(groups(range(devices), DEGREES), {1: devices})
    source = demands(devices, classes, random.Random(0))
    planner = Planner(laws, profile.quality)
    demand = next(source)
    offered = [planner.offered(flow, demand, ground) for flow in demand.flows]

    def tables() -> None:
        planner.learned(laws, profile.quality)
        for flow in demand.flows:
            planner.offered(flow, demand, ground)

    ways: dict[str, Callable[[], object] | None] = {
        "nothing": None,
        "hashing, without the lock": lambda: hashlib.sha256(FODDER).digest(),
        "the program": lambda: PlanProgram(offered, ground, 0.1, 0.9).proposal(),
        "tables": tables,
        "whole advice": lambda: planner.advise(next(source)),
    }
    with PlannerProcess(laws, profile.quality, planner.setup) as planner_process:
        planner_process.advise(demand)
        ways["advice, in a process"] = lambda: planner_process.advise(next(source))
        return {name: asyncio.run(lateness(seconds, way)) for name, way in ways.items()}


def spread(times: list[float]) -> tuple[float, float, float]:
    return statistics.mean(times), sorted(times)[int(0.99 * (len(times) - 1))], max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--devices", type=numbers, default=[8, 64, 512, 4096])
    parser.add_argument("--classes", type=numbers, default=[1, 3, 6])
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement of stalls")
    milliseconds = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    help = "milliseconds that a thread may keep the interpreter's lock while others want it"
    parser.add_argument("--switch", type=milliseconds, default=[5.0, 0.5], help=help)
    args = parser.parse_args()
    console = Console(width=120)
    heads = ("mean, ms", "p99", "max", "mean of processor", "p99", "max", "tables, mean", "max")
    table = Table("devices", "classes", *heads, title="solving")
    with Progress(console=Console(stderr=True)) as bar:
        shown = bar.add_task("solving", total=len(args.devices) * len(args.classes) * args.repeat)
        for devices in args.devices:
            for classes in args.classes:
                solved, worked, tabled = solving(devices, classes, args.repeat, lambda: bar.advance(shown))
                cells = [*spread(solved), *spread(worked), statistics.mean(tabled), max(tabled)]
                table.add_row(str(devices), str(classes), *(f"{one:.1f}" for one in cells))
    console.print(table)
    heads = ("switch, ms", "a thread does", "beats", "late p50, ms", "p99", "max")
    table = Table(*heads, title="the loop meanwhile (8 devices)")
    for interval in args.switch:
        sys.setswitchinterval(interval / 1000)
        for name, late in stalls(args.seconds, 8, max(args.classes)).items():
            quantiles = late[len(late) // 2], late[int(0.99 * (len(late) - 1))], late[-1]
            table.add_row(f"{interval:g}", name, str(len(late)), *(f"{one:.2f}" for one in quantiles))
    console.print(table)


if __name__ == "__main__":
    main()
