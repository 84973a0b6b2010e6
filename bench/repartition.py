"""What changing the plan while serving is worth, on virtual time: LLaDA-8B's costs, 8 or 16 H200s.

    python bench/repartition.py [--devices 8,16] [--only steady,regimes,swing,bursts,light] [--seeds 3] [--trace FILE]
                                [--jobs 2] [--cells FILE]

The same requests against every static plan (all counts by degree, or `--mixes pure` for those of one degree), against
the planner with instances formed in place, and against the planner where forming one takes 150 s, as by a restart:
one that knows what that costs, and one that changes as if it were nothing. Everything else is equal. 1.0x is what
data-parallel instances carry at threshold .9 by the law of steps; deadlines are multiples of the unloaded latency on
one device. A request that is declined or late has missed. Prints tables and writes them to a Markdown file. `--cells`
keeps what was measured, so that a run can be done in parts; remove that file when the code has changed.

    steady   deadlines of 1.0x, 1.5x and 2x at constant load
    regimes  by turns a minute of few requests with deadlines of .8x and a minute of many with 3x
    swing    the rate goes up and down by 20 times in four minutes, half the deadlines are 1.0x, half 2x
    bursts   five times in a hundred seconds four seconds of three times the rate, deadlines of 1.0x and 2x
    light    mean latency at .05x to .2x load, deadlines of 3x
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from dilaserve.config import Config
from dilaserve.planner.operating_points import unloaded
from dilaserve.planner.packing import groups
from dilaserve.planner.planner import Planner, Setup
from dilaserve.planner.step_pace import Kind, paced
from dilaserve.plans import counted
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.profile_file import cost_key
from dilaserve.sim import workload
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.report import report
from dilaserve.sim.run import Run, pretended, simulate
from dilaserve.sim.workload import Job

PROMPT, ANSWER, LIMIT = 200, 256, 1024
DEGREES = (1, 2, 4, 8)
IN_PLACE, RESTART = 0.02, 150.0  # seconds in which an instance is formed
AUTO, RESTARTING, REGARDLESS = "auto", "auto by restart", "auto by restart at any price"
PLANNED = (AUTO, RESTARTING, REGARDLESS)
Rate = Callable[[float], float]


class Case(NamedTuple):
    """One column: requests a second at a time, the deadlines at that time, and how long it goes on."""

    part: str
    name: str
    rate: Rate
    scales: Callable[[float], Sequence[float]]
    seconds: float
    peak: float  # of the rate


class Cell(NamedTuple):
    """Deadlines met in %, mean latency of those served in seconds, accuracy drop in points, changes of plan."""

    attainment: float
    latency: float
    drop: float
    changes: float


class Task(NamedTuple):
    """One run, in words, so that other processes can do it."""

    devices: int
    part: str
    name: str
    system: str
    seed: int


def alone() -> float:
    """Seconds of a request on one device that it has for itself."""
    known = llada_8b_h200()
    return unloaded(known.costs[cost_key("cuda", 1)], Forecast(known.quality), Kind(PROMPT + ANSWER, ANSWER))


def knee(devices: int) -> float:
    """Requests a second that data-parallel instances carry at the reference threshold."""
    known = llada_8b_h200()
    forecast = Forecast(known.quality)
    ahead = forecast.ahead("any", 0, 0, ANSWER // 32, 32)
    pace = paced(known.costs[cost_key("cuda", 1)], Kind(PROMPT + ANSWER, ANSWER), ahead, 6, 32, 0.0)
    lives: list[float] = pace.life.tolist()
    return devices * max(rows / life for rows, life in enumerate(lives, 1))


def cases(one: float, args: argparse.Namespace) -> Iterator[Case]:
    """`one` is 1.0x load."""
    for scale in (1.0, 1.5, 2.0):
        for load in args.loads:
            yield Case("steady", f"{scale:g}x at {load:g}", flat(load * one), always(scale), args.seconds, load * one)
    for load in args.loads:
        low, high = 0.4 * load * one, 1.6 * load * one
        yield Case("regimes", f"{load:g}", turns(low, high), by_turns, 4 * 60.0, high)
        yield Case("swing", f"{load:g}", swing(load * one), always(1.0, 2.0), 480.0, 1.9 * load * one)
        yield Case("bursts", f"{load:g}", burst(load * one), always(1.0, 2.0), 2 * args.seconds, 3 * load * one)
    for load in (0.05, 0.1, 0.2):
        yield Case("light", f"{load:g}", flat(load * one), always(3.0), 2 * args.seconds, load * one)


def flat(rate: float) -> Rate:
    return lambda at: rate


def turns(low: float, high: float) -> Rate:
    return lambda at: low if at % 120 < 60 else high


def by_turns(at: float) -> Sequence[float]:
    return (0.8,) if at % 120 < 60 else (3.0,)


def swing(mean: float) -> Rate:
    """By 1.9 / .1 = 19 times."""
    return lambda at: mean * (1 - 0.9 * math.cos(2 * math.pi * at / 240))


def burst(mean: float) -> Rate:
    """A fifth of each 20 s at three times the rate, the rest at half."""
    return lambda at: mean * (3.0 if at % 20 < 4 else 0.5)


def always(*scales: float) -> Callable[[float], Sequence[float]]:
    return lambda at: scales


def jobs(case: Case, seed: int, trace: Path | None) -> list[Job]:
    """A Poisson process thinned to the rate; from a trace, its times at the mean rate and its lengths."""
    rng = random.Random(f"{case.part} {case.name} {seed}")
    if trace and case.part in ("swing", "bursts"):
        mean = statistics.fmean(case.rate(case.seconds * i / 1000) for i in range(1000))
        rows = workload.scaled(workload.trace(trace), mean, start=0.1 * seed)
        scales = tuple((scale, 1.0) for scale in case.scales(0.0))
        return workload.jobs(rows, case.seconds, LIMIT, (None,), scales, seed, "cancel_when_late")
    found: list[Job] = []
    for at in workload.poisson(case.peak, rng):
        if at >= case.seconds:
            return found
        if rng.random() < case.rate(at) / case.peak:
            found.append(Job(at, PROMPT, ANSWER, None, rng.choice(case.scales(at)), "cancel_when_late"))
    raise AssertionError("arrivals do not end")


def plans(devices: int, kind: str) -> list[str]:
    """The counts by degree that use all devices."""
    if kind == "pure":
        return [f"{devices // degree}x{degree}" for degree in DEGREES if degree <= devices]
    most = groups(range(devices), [degree for degree in DEGREES if degree <= devices])

    def rest(left: int, degrees: Sequence[int]) -> Iterator[dict[int, int]]:
        if not degrees:
            if left == 0:
                yield {}
            return
        *smaller, degree = degrees
        for count in range(left // degree + 1):
            for others in rest(left - count * degree, smaller):
                yield {**others, degree: count}

    return [counted(counts) for counts in rest(devices, list(most))]


def played(case: Case, system: str, devices: int, seed: int, trace: Path | None) -> Run:
    known, work = llada_8b_h200(), jobs(case, seed, trace)
    automatic = system in PLANNED
    delay = RESTART if system in (RESTARTING, REGARDLESS) else IN_PLACE
    scales = {job.scale for job in work if job.scale is not None}
    config = Config.of(  # in seconds: what an unloaded request takes is learned, and not the same under every plan
        slo_class=",".join(f"x{scale:g}={1000 * scale * alone():.3f}ms" for scale in sorted(scales)),
        max_queue=8192,
        plan="auto" if automatic else system,
        step_timeout=max(20.0, 2 * delay),
    )
    planner = None
    if automatic:
        laws = {degree: known.costs[cost_key("cuda", degree)] for degree in DEGREES}
        pause = RESTART if system == RESTARTING else 0.1
        planner = Planner(laws, known.quality, Setup.of(config, known.quality, pause))
    assemble = pretended(known, devices, LIMIT, seed=seed, delay=delay)
    return simulate(config, assemble, list(known.quality.tasks), work, planner=planner)


def measured(task: Task, args: argparse.Namespace) -> Cell:
    (case,) = [one for one in cases(knee(task.devices), args) if one.part == task.part and one.name == task.name]
    run = played(case, task.system, task.devices, task.seed, args.trace)
    result = report(run, case.seconds)
    changes = sum(change.before != change.after for change in run.engine.history) - 1  # the start is one
    return Cell(100 * (result.attainment or 0.0), result.mean_latency, result.expected_drop, changes)


def all_measured(tasks: Sequence[Task], args: argparse.Namespace, tick: Callable[[], None]) -> dict[Task, Cell]:
    """Every task with its cell; those in the file of cells are taken from there, the others are put there."""
    known: dict[str, Cell] = {}
    if args.cells and args.cells.exists():
        known = msgspec.json.decode(args.cells.read_bytes(), type=dict[str, Cell])
    missing = [task for task in tasks if key(task, args) not in known]
    with ProcessPoolExecutor(args.jobs) as pool:
        pending = {pool.submit(measured, task, args): task for task in missing}
        for done in as_completed(pending):
            known[key(pending[done], args)] = done.result()
            if args.cells:
                args.cells.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=1))
            tick()
    return {task: known[key(task, args)] for task in tasks}


def key(task: Task, args: argparse.Namespace) -> str:
    return " | ".join(map(str, (*task, args.seconds, args.trace)))


def averaged(found: Mapping[Task, Cell]) -> dict[tuple[str, str], Cell]:
    """Over the seeds, by case and system."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for task, cell in found.items():
        groups.setdefault((task.name, task.system), []).append(cell)
    return {place: Cell(*map(statistics.fmean, zip(*cells, strict=True))) for place, cells in groups.items()}


def table(part: str, devices: int, cells: dict[tuple[str, str], Cell], systems: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name for name, _ in cells))
    what = "mean latency, s (drop in points)" if part == "light" else "deadlines met, % (drop in points)"
    lines = [f"**{part}**, {devices} devices: {what}", "", "| plan | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    lines += [
        f"| {system} | " + " | ".join(shown(part, cells[name, system]) for name in names) + " |" for system in systems
    ]
    fixed = [system for system in systems if system not in PLANNED]
    if fixed and AUTO in systems:
        lines.append(
            "| auto against the best plan | " + " | ".join(versus(part, cells, n, fixed) for n in names) + " |"
        )
        lines.append("| changes of plan | " + " | ".join(f"{cells[name, AUTO].changes:.1f}" for name in names) + " |")
    return [*lines, ""]


def shown(part: str, cell: Cell) -> str:
    return f"{cell.latency:.3f} ({cell.drop:.2f})" if part == "light" else f"{cell.attainment:.1f} ({cell.drop:.2f})"


def versus(part: str, cells: dict[tuple[str, str], Cell], name: str, fixed: Sequence[str]) -> str:
    auto = cells[name, AUTO]
    if part == "light":
        single = next(system for system in fixed if system.endswith("x1"))
        return f"{100 * (auto.latency / cells[name, single].latency - 1):+.0f} % of {single}"
    best = max(fixed, key=lambda system: cells[name, system].attainment)
    return f"{auto.attainment - cells[name, best].attainment:+.1f} ({best})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--devices", type=lambda text: [int(part) for part in text.split(",")], default=[8, 16])
    parser.add_argument("--only", type=words, default=["steady", "regimes", "swing", "bursts", "light"])
    parser.add_argument("--loads", type=numbers, default=[0.4, 0.7, 1.0])
    parser.add_argument("--mixes", choices=("all", "pure"), default="all", help="static plans to compare with")
    parser.add_argument("--systems", type=words, help="instead of all plans and planners, e.g. 8x1,2x4,auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of steady load; twice that where it varies")
    parser.add_argument("--trace", type=Path, help="arrivals and lengths of swing and bursts: a CSV, gzipped or not")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--cells", type=Path, help="file of what was measured before")
    parser.add_argument("--out", type=Path, default=Path("bench/results/repartition.md"))
    args = parser.parse_args()
    lines = [f"`python {' '.join(sys.argv)}`, virtual time, costs of LLaDA-8B on H200s from data sheets.", ""]
    with Progress(console=Console(stderr=True)) as bar:
        for devices in args.devices:
            systems = args.systems or [*plans(devices, args.mixes), *PLANNED]
            wanted = [case for case in cases(knee(devices), args) if case.part in args.only]
            tasks = [
                Task(devices, case.part, case.name, system, seed)
                for case in wanted
                for system in systems
                for seed in range(args.seeds)
            ]
            shown = bar.add_task(f"{devices} devices", total=len(tasks))
            found = all_measured(tasks, args, lambda shown=shown: bar.advance(shown))  # type: ignore[misc]
            lines += [f"{devices} devices: 1.0x = {knee(devices):.1f} requests/s, {args.seeds} seeds", ""]
            for part in args.only:
                cells = averaged({task: cell for task, cell in found.items() if task.part == part})
                lines += table(part, devices, cells, systems)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines))
    Console().print(Markdown("\n".join(lines)))


if __name__ == "__main__":
    main()
