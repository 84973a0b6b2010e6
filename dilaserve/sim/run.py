"""One simulated run: real engines on a virtual clock, requests thrown at them, and what became of each."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, ModelCard, Parts, first_plan, unplanned
from dilaserve.engine.engine import Engine
from dilaserve.engine.stream import collect
from dilaserve.engine.submit import Options
from dilaserve.errors import DilaserveError
from dilaserve.executor.executor import Progress
from dilaserve.planner.planner import Planner, PlannerPort, Setup
from dilaserve.planner.process import PlannerProcess
from dilaserve.profile.profile_file import ModelProfile, cost_key
from dilaserve.profile.step_cost import StepCost
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.machine import DELAY, SimMachine
from dilaserve.sim.quote import hurried
from dilaserve.sim.workload import Job
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.transport.request_table import RequestTable, nbytes, private_bytes
from dilaserve.types import FamilyTraits, Usage

MASK = 2**30  # no token of a pretended model
DEGREES = (1, 2, 4, 8)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request; seconds. `latency` is None for one that was declined.

    `node` is the number of the engine that had it, 0 where there is one.
    """

    at: float
    task: str | None
    scale: float | None
    deadline: float | None
    latency: float | None
    met: bool | None
    usage: Usage | None
    node: int = 0


class PlainText(Text):
    """Stands in for a tokenizer: prompts are token ids, and no text comes out."""

    def __init__(self) -> None:
        self.template, self.untemplated = None, "its text is filler"

    def load_template(self) -> None:
        pass

    def decode(self, ids: object) -> str:
        return ""

    def decode_more(self, stream: object, ids: object) -> str:
        return ""


def pretended(
    profile: ModelProfile,
    devices: int,
    limit: int,
    truth: Mapping[int, StepCost] | None = None,
    seed: int = 0,
    text: Text | None = None,
    delay: float = DELAY,
    planner_port: type[Planner] | type[PlannerProcess] = Planner,
    traits: FamilyTraits = FamilyTraits(),  # noqa: B008
    degrees: Sequence[int] = DEGREES,
) -> Assemble:
    """Parts without a model: `devices` machines that behave as the profile says, or as `truth` costs by degree.

    `delay` are the seconds that forming an instance takes; `planner_port` plans, be the loop's time virtual or
    real.
    """

    def assemble(config: Config, progress: Progress) -> Parts:
        laws = by_degree(profile.costs)
        allowed = tuple(degree for degree in degrees if degree <= devices)
        plan = first_plan(config.device.plan, devices, allowed)
        rows = config.scheduler.max_queue
        table = RequestTable(rows, limit, private_bytes(nbytes(rows, limit)))
        pool = config.device.kv_cache_tokens or config.device.max_num_seqs * limit
        machine = SimMachine(table, devices, truth or laws, profile.quality, pool, MASK, seed, delay=delay)
        card = ModelCard(profile.model, limit, 0, 0, profile.model, traits)
        names = [f"sim:{i}" for i in range(devices)]
        setup = Setup.of(config, profile.quality, traits=traits)
        planner = planner_port(laws, profile.quality, setup) if len(laws) > 1 else None
        return Parts(
            card,
            MASK,
            MASK,
            text or PlainText(),
            table,
            machine,
            laws,
            profile.quality,
            names,
            allowed,
            plan,
            planner=planner,
            unplanned=unplanned(laws, allowed, config),
        )

    return assemble


def by_degree(costs: Mapping[str, StepCost]) -> dict[int, StepCost]:
    """The laws of the profile's first kind of device."""
    kind = next(iter(costs)).rpartition(" x")[0]
    return {degree: costs[cost_key(kind, degree)] for degree in DEGREES if cost_key(kind, degree) in costs}


class Noted(NamedTuple):
    """All engines at one second: requests, their mean threshold, and devices by tensor-parallel degree."""

    second: float
    waiting: int
    running: int
    threshold: float
    devices: dict[int, int]


class Run(NamedTuple):
    """`outcomes` in the order of arrival; the engines have been left."""

    outcomes: list[Outcome]
    engines: list[Engine]
    timeline: list[Noted]

    @property
    def engine(self) -> Engine:
        """The first engine, of a run that has one."""
        return self.engines[0]


def simulate(
    config: Config,
    assemble: Assemble,
    tasks: Sequence[str],
    jobs: Sequence[Job],
    seen: Callable[[int], None] = lambda done: None,
    planner: PlannerPort | None = None,
) -> Run:
    """Run all jobs to their end; `seen` hears how many have arrived."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(play(config, assemble, tasks, jobs, seen, planner))


async def play(
    config: Config,
    assemble: Assemble,
    tasks: Sequence[str],
    jobs: Sequence[Job],
    seen: Callable[[int], None],
    planner: PlannerPort | None,
) -> Run:
    async with Engine(config, assemble=assemble, planner=planner) as engine:
        return await sent(lambda job, number: ask(engine, job, tasks, number), [engine], jobs, seen)


async def sent(
    send: Callable[[Job, int], Awaitable[Outcome]],
    engines: list[Engine],
    jobs: Sequence[Job],
    seen: Callable[[int], None],
) -> Run:
    """Send each job, with its number from 1 on, when it is due, and wait until all have ended."""
    loop = asyncio.get_running_loop()
    outcomes: list[Outcome] = []
    timeline: list[Noted] = []
    began = loop.time()

    async def one(job: Job, number: int) -> None:
        outcomes.append(await send(job, number))

    async with asyncio.TaskGroup() as group:
        watching = asyncio.create_task(watch(engines, timeline, began))
        for count, job in enumerate(jobs):
            await asyncio.sleep(began + job.at - loop.time())
            group.create_task(one(job, count + 1))
            seen(count + 1)
    watching.cancel()
    return Run(sorted(outcomes, key=lambda outcome: outcome.at), engines, timeline)


async def ask(engine: Engine, job: Job, tasks: Sequence[str], number: int = 0, spent: float = 0.0) -> Outcome:
    """Ask for it; prompts of different `number`s differ from the token behind the shared ones on.

    `spent` are seconds for which the request was under way already.
    """
    loop = asyncio.get_running_loop()
    index = tasks.index(job.task) if job.task in tasks else 0
    prompt = [index] + [0] * (job.prompt_tokens - 1)
    if (first := max(1, job.shared)) < job.prompt_tokens:
        prompt[first] = number
    began = loop.time() - spent
    try:
        async with await engine.submit(prompt, hurried(options_of(job), spent)) as stream:
            answer = await collect(stream)
    except DilaserveError:
        return Outcome(at=job.at, task=job.task, scale=job.scale, deadline=None, latency=None, met=False, usage=None)
    usage = answer.usage
    return Outcome(
        at=job.at,
        task=job.task,
        scale=job.scale,
        deadline=usage.deadline,
        latency=loop.time() - began,
        met=usage.deadline_met,
        usage=usage,
    )


def options_of(job: Job) -> Options:
    name = None if job.scale is None else f"x{job.scale:g}"
    return Options(max_tokens=job.max_tokens, slo_class=name, task=job.task, on_miss=job.on_miss)


async def watch(engines: Sequence[Engine], timeline: list[Noted], began: float) -> None:
    """Note queue lengths, the mean threshold and the plan every second of virtual time."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(1.0)
        rows = [row for engine in engines for row in engine.scheduler.requests.values()]
        placed = [row for row in rows if row.replica]
        mean = sum(row.table_threshold for row in placed) / len(placed) if placed else math.nan
        devices = Counter(len(group) for engine in engines for group in engine.plan.groups for _ in group)
        timeline.append(Noted(loop.time() - began, len(rows) - len(placed), len(placed), mean, dict(devices)))


def classes(scales: Sequence[float | None]) -> str:
    """The --slo-class that names these deadlines."""
    return ",".join(f"x{scale:g}={scale:g}x" for scale in sorted({scale for scale in scales if scale is not None}))


def written(run: Run, file: Path) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(run.outcomes), indent=1))
