"""The simulator held against the real thing: one run on this machine, and the same arrivals on a virtual clock.

    python bench/fidelity.py [--loads .5,.8,1,1.3] [--seconds 30] [--devices cpu,cpu]

The real run is the embedded engine on the bundled model with its profile; the simulated ones are the same engine on
pretended devices, once with the step costs of the profile, which were measured on a quiet machine, and once with those
that the real run has learned, which hold what clients, event loop and workers take from each other. Beside latency and
attainment it prints how well the scheduler's own forecasts held: the error of each step's predicted time (before it was
learned from), and of the steps that requests had left, at each of their steps. 1.0x is what the profile takes for the
devices' capacity at threshold .9.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from replay import MAX_TOKENS, chat

from dilaserve import Config, Engine, Options
from dilaserve.errors import DilaserveError
from dilaserve.models.checkpoint import locate
from dilaserve.profile import profile_file
from dilaserve.profile.problems import TASKS, Problem, held_out
from dilaserve.profile.step_cost import Features, StepCost
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.request_state import RequestState
from dilaserve.sim.run import pretended, simulate
from dilaserve.sim.workload import Job, poisson
from dilaserve.tokenizer.tokenizer import Text

SCALE = 2.0
NAME = "double"


class Fate(NamedTuple):
    latency: float | None
    met: bool
    steps: int


class Errors:
    """Listens to a scheduler's forecasts and to what became true."""

    def __init__(self, estimates: Estimates) -> None:
        self.estimates = estimates
        self.step_times: list[float] = []
        self.forecasts: dict[str, list[float]] = {}
        self.off = self.total = 0.0
        self.stepped, self.watched = estimates.stepped, estimates.watched
        estimates.stepped, estimates.watched = self.on_step, self.on_row  # type: ignore[method-assign]

    def on_step(self, features: Features, refreshes: bool, seconds: float, turnaround: float, degree: int) -> None:
        self.step_times.append(abs(self.estimates.pace(degree).learner.seconds(features, refreshes) / seconds - 1))
        self.stepped(features, refreshes, seconds, turnaround, degree)

    def on_row(self, progress: RequestState, masks: int, block: int, unmasked: int, ended: bool) -> None:
        self.watched(progress, masks, block, unmasked, ended)
        progress.loads = None
        steps = self.estimates.loads(progress, self.estimates.base)[progress.level].steps
        self.forecasts.setdefault(progress.request.id, []).append(steps)
        if ended:
            seen = self.forecasts.pop(progress.request.id)
            actual = range(len(seen) - 1, -1, -1)
            self.off += sum(abs(guess - left) for guess, left in zip(seen[:-1], actual, strict=False))
            self.total += sum(actual)


class Real(NamedTuple):
    fates: list[Fate]
    errors: Errors
    laws: dict[int, StepCost]


async def real(config: Config, jobs: Sequence[Job], problems: Sequence[Problem]) -> Real:
    async with Engine(config) as engine:
        errors = Errors(engine.scheduler.estimates)

        async def one(job: Job, problem: Problem) -> Fate:
            await asyncio.sleep(began + job.at - time.perf_counter())
            sent = time.perf_counter()
            options = Options(max_tokens=MAX_TOKENS, slo_class=NAME, task=problem.task, on_miss="cancel_when_late")
            try:
                answer = await engine.generate(chat(problem), options)
            except DilaserveError:
                return Fate(None, False, 0)
            return Fate(time.perf_counter() - sent, bool(answer.usage.deadline_met), answer.usage.steps)

        for problem in problems[:10]:  # warm up
            await engine.generate(chat(problem), Options(max_tokens=MAX_TOKENS))
        began = time.perf_counter()
        fates = list(await asyncio.gather(*map(one, jobs, problems)))
        return Real(fates, errors, engine.scheduler.estimates.known()[0])


def pretend(
    config: Config, jobs: Sequence[Job], devices: int, limit: int, laws: dict[int, StepCost] | None = None
) -> list[Fate]:
    profile = profile_file.find(locate(config.model.model), None)
    assert profile
    run = simulate(config, pretended(profile, devices, limit, laws), list(profile.quality.tasks), jobs)
    return [Fate(one.latency, bool(one.met), one.usage.steps if one.usage else 0) for one in run.outcomes]


def shown(name: str, fates: Sequence[Fate]) -> str:
    served = [fate for fate in fates if fate.latency is not None]
    latencies = sorted(1000 * fate.latency for fate in served if fate.latency is not None) or [0.0]
    met = 100 * sum(fate.met for fate in fates) / len(fates)
    steps = statistics.fmean([fate.steps for fate in served] or [0])
    mean, p90 = statistics.fmean(latencies), latencies[int(0.9 * (len(latencies) - 1))]
    return f"{name:>31}: met {met:5.1f} %   mean {mean:6.1f} ms   p90 {p90:6.1f} ms   steps {steps:5.2f}"


def capacity(model: str, devices: int, tasks: Sequence[str]) -> float:
    """Requests a second that the profile expects `devices` to finish at .9, three rows to a step."""
    profile = profile_file.find(locate(model), None)
    if profile is None:
        raise SystemExit("no profile yet: run `python -m dilaserve calibrate` first")
    law = profile.costs[profile_file.cost_key("cpu")]
    steps = statistics.fmean(profile.quality.tasks[task].steps[0] for task in tasks)
    refresh = law.marginal(130, 130 * 130, 130, 32, 1)
    reuse = law.marginal(32, 32 * 130, 130, 32, 1)
    return devices / (refresh + max(0.0, steps - 1) * reuse + steps * law.fixed / 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--loads", type=lambda text: [float(part) for part in text.split(",")], default=[0.5, 0.8, 1.0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--devices", default=",".join(["cpu"] * (os.cpu_count() or 1)))
    parser.add_argument("--rate", type=float, help="requests a second at 1.0x")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    args = parser.parse_args()
    devices = len(args.devices.split(","))
    rate = args.rate or capacity(args.model, devices, args.tasks)
    text = Text(locate(args.model))
    text.load_template()
    config = Config.of(model=args.model, devices=args.devices, slo_class=f"{NAME}={SCALE}x", max_queue=4096)
    print(f"1.0x = {rate:.1f} requests/s on {args.devices}; deadlines {SCALE}x the unloaded latency")
    for load in args.loads:
        rng = random.Random(f"fidelity {load}")
        times = list(itertools.takewhile(lambda at: at < args.seconds, poisson(load * rate, rng)))
        pools = {task: itertools.cycle(held_out(task, 300, seed=11)) for task in args.tasks}
        problems = [next(pools[rng.choice(args.tasks)]) for _ in times]
        jobs = [
            Job(at, len(text.encode_chat(chat(problem))), MAX_TOKENS, problem.task, SCALE, "cancel_when_late")
            for at, problem in zip(times, problems, strict=True)
        ]
        fates, errors, laws = asyncio.run(real(config, jobs, problems))
        print(f"{load:g}x, {len(jobs)} requests")
        print(shown("real", fates))
        print(shown("simulated, costs of the profile", pretend(named(config), jobs, devices, 512)))
        print(shown("simulated, costs learned", pretend(named(config), jobs, devices, 512, laws)))
        step_error = 100 * statistics.fmean(errors.step_times)
        median, left = 100 * statistics.median(errors.step_times), errors.off / errors.total
        print(f"  step time off by {step_error:.1f} % (median {median:.1f} %), steps left by {left:.2f}")


def named(config: Config) -> Config:
    """The simulator names its classes after their multiple."""
    return Config.of(
        model=config.model.model, devices=config.device.devices, slo_class=f"x{SCALE:g}={SCALE:g}x", max_queue=4096
    )


if __name__ == "__main__":
    main()
