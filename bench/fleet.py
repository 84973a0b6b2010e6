"""How well planning foretells what fleets of equal instances do: predicted beside simulated, and what a choice costs.

    python bench/fleet.py [--scales .8,1,1.3,2,3] [--rates 10,20,32,44] [--seconds 30] [--devices 8]

For each degree the fleet is simulated as so many machines of that degree's step costs, with the scheduler as it
serves; the prediction is that of the linear program for these counts. `lost` is how much more the best degree
meets than the degree that is predicted to be worth the most. Deadlines are multiples of the unloaded latency on one
device, rates requests a second for all devices together.
"""

import argparse
import itertools
import random
import statistics

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dilaserve.config import Config
from dilaserve.planner.operating_points import points, unloaded
from dilaserve.planner.packing import groups
from dilaserve.planner.planner import Setup
from dilaserve.planner.program import Ground, Offered, PlanProgram
from dilaserve.planner.step_pace import Kind
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.profile.step_cost import StepCost
from dilaserve.sim import workload
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.report import Report, report
from dilaserve.sim.run import by_degree, pretended, simulate

PROMPT, ANSWER, LIMIT = 200, 256, 1024


def simulated(
    known: ModelProfile, law: StepCost, instances: int, rate: float, deadline: float, seconds: float
) -> Report:
    rng = random.Random(0)
    times = zip(workload.poisson(rate, rng), itertools.repeat(PROMPT), itertools.repeat(ANSWER), strict=False)
    jobs = workload.jobs(times, seconds, LIMIT, (None,), ((1.0, 1.0),), 0, "cancel_when_late")
    config = Config.of(slo_class=f"x1={1000 * deadline:.1f}ms", max_queue=8192)
    lone = msgspec.structs.replace(known, costs={next(iter(known.costs)): law})
    return report(simulate(config, pretended(lone, instances, LIMIT), list(known.quality.tasks), jobs), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--scales", type=numbers, default=[0.8, 1.0, 1.3, 2.0, 3.0])
    parser.add_argument("--rates", type=numbers, default=[10.0, 20.0, 32.0, 44.0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    known = llada_8b_h200()
    laws = {n: law for n, law in by_degree(known.costs).items() if n <= args.devices}
    forecast, setup = Forecast(known.quality), Setup()
    alone = unloaded(laws[1], forecast, Kind(PROMPT + ANSWER, ANSWER))
    ground = Ground(groups(range(args.devices), list(laws)), {1: args.devices})
    table = Table(
        "deadline", "rate", *(f"{args.devices // n}x{n}: simulated, predicted" for n in laws), "chosen", "lost"
    )
    errors, lost = [], []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("fleets", total=len(args.scales) * len(args.rates) * len(laws))
        for scale, rate in itertools.product(args.scales, args.rates):
            kind = Kind(PROMPT + ANSWER, ANSWER, scale * alone)
            tables = {n: points(law, forecast, kind, args.devices // n, setup.rows) for n, law in laws.items()}
            offered = [Offered("all", rate, alone, tables)]
            met, predicted = {}, {}
            for n, law in laws.items():
                predicted[n] = PlanProgram(offered, ground, 0.0, setup.budget).proposal({n: args.devices // n})
                run = simulated(known, law, args.devices // n, rate, scale * alone, args.seconds)
                met[n] = run.attainment or 0.0
                bar.advance(task)
            chosen = max(laws, key=lambda n: predicted[n].value)
            lost.append(100 * (max(met.values()) - met[chosen]))
            errors += [100 * (predicted[n].on_time - met[n]) for n in laws]
            cells = (f"{100 * met[n]:.1f}, {100 * predicted[n].on_time:.1f}" for n in laws)
            table.add_row(f"{scale:g}x", f"{rate:g}", *cells, f"{args.devices // chosen}x{chosen}", f"{lost[-1]:.1f}")
    console = Console(width=140)
    console.print(table)
    console.print(
        f"error of prediction: mean {statistics.fmean(errors):+.1f} points, mean absolute "
        f"{statistics.fmean(map(abs, errors)):.1f}; lost by the choice: mean {statistics.fmean(lost):.2f}, "
        f"most {max(lost):.1f}"
    )


if __name__ == "__main__":
    main()
