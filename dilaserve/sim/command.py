"""`dilaserve simulate`: from flags to a run, a report and files."""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble
from dilaserve.errors import ConfigError
from dilaserve.models.checkpoint import locate
from dilaserve.planner.process import PlannerProcess
from dilaserve.profile import profile_file
from dilaserve.profile.decode_speed import ANY
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.sim import routing_report, workload
from dilaserve.sim.data_sheet import Pretended, pretended_model
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.layout import Layout, layout
from dilaserve.sim.nodes import Node, node_seed, simulate_nodes
from dilaserve.sim.published import NAMES
from dilaserve.sim.report import Report, lines, report
from dilaserve.sim.routing_report import RoutingReport
from dilaserve.sim.run import Run, classes, pretended, written
from dilaserve.sim.run import simulate as play
from dilaserve.sim.workload import Job
from dilaserve.tokenizer.tokenizer import Text

Scales = tuple[tuple[float | None, float], ...]
MOST_REQUESTS = 10_000_000
ROWS = 4096  # requests that run or wait at once, so that a backlog shows instead of refusals


def simulate(settings: Config, extras: argparse.Namespace, seen: Callable[[str, int, int], None]) -> Iterator[str]:
    """Lines to print; raises `ConfigError`."""
    nodes = layout(extras)
    model = costs(extras.costs)
    scales = mix(extras.deadline)
    limit = settings.model.max_model_len or 4096
    jobs, cut = traffic(extras, model.profile, scales, limit)
    settings = prepared(settings, scales)
    began = time.perf_counter()
    played = playing(settings, extras, model, nodes, jobs, lambda done: seen("requests", done, len(jobs)))
    took = time.perf_counter() - began
    yield from lines(played.report)
    if played.routing:
        yield from routing_report.lines(played.routing)
    if cut:
        yield f"{cut} of {len(jobs)} requests were cut to the {limit} tokens that the model holds (--max-model-len)"
    yield f"{played.devices} devices, {extras.seconds:g} s simulated in {took:.1f} s ({extras.seconds / took:.0f}x)"
    if extras.out:
        yield from saved(played, settings, extras)


class Played(NamedTuple):
    run: Run
    report: Report
    routing: RoutingReport | None
    devices: int


def playing(
    settings: Config,
    extras: argparse.Namespace,
    model: Pretended,
    nodes: Layout | None,
    jobs: Sequence[Job],
    seen: Callable[[int], None],
) -> Played:
    """Run the jobs on one engine, or on nodes behind a router."""
    tasks, limit = list(model.profile.quality.tasks), settings.model.max_model_len or 4096

    def machines(devices: int, node: int = 0) -> Assemble:
        seed = node_seed(extras.sim_seed, node)
        return pretended(model.profile, devices, limit, seed=seed, traits=model.traits, degrees=model.degrees)

    if nodes is None:
        run = play(settings, machines(extras.sim_devices), tasks, jobs, seen)
        return Played(run, report(run, extras.seconds), None, extras.sim_devices)
    engines = [Node(settings, machines(devices, node), devices) for node, devices in enumerate(nodes.devices)]
    run, spent = simulate_nodes(engines, nodes.rule, tasks, jobs, nodes.delay, extras.sim_seed, seen)
    whole = report(run, extras.seconds)
    routing = routing_report.routing_report(run.outcomes, spent, nodes, extras.seconds, whole.warm_up)
    return Played(run, whole, routing, sum(nodes.devices))


def assembly(settings: Config, extras: argparse.Namespace) -> Assemble:
    """Pretended devices behind the model's own tokenizer."""
    text = Text(locate(settings.model.model), settings.model.chat_template)
    limit = settings.model.max_model_len or 4096
    model = costs(extras.costs)
    return pretended(
        model.profile,
        extras.sim_devices,
        limit,
        seed=extras.sim_seed,
        text=text,
        planner_port=PlannerProcess,
        traits=model.traits,
        degrees=model.degrees,
    )


def saved(played: Played, settings: Config, extras: argparse.Namespace) -> Iterator[str]:
    from dilaserve.sim import timeline

    out: Path = extras.out
    written(played.run, out / "outcomes.json")
    whole = {
        **msgspec.to_builtins(played.report),
        **({"routing": msgspec.to_builtins(played.routing)} if played.routing else {}),
        "simulation": {name: value for name, value in vars(extras).items() if name != "out"},
        "settings": {name: part for name, part in msgspec.to_builtins(settings).items() if name != "server"},
    }
    (out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(whole, enc_hook=str), indent=1))
    if rows := timeline.moments(played.run, extras.seconds):
        rate, where = played.report.rate, f"{played.devices} simulated devices"
        where += f" of {len(played.routing.nodes)} nodes" if played.routing else ""
        timeline.draw(rows, f"{where}, {rate:.1f} requests/s, deadlines {extras.deadline} x", out / "timeline.png")
    yield f"saved in {out}"


def costs(name: str) -> Pretended:
    """The built-in model of this name, or the profile in this file, of a model with full attention."""
    if name in NAMES:
        return pretended_model(name)
    return Pretended(llada_8b_h200() if name == "h200" else profile_file.read(Path(name)))


def prepared(settings: Config, scales: Scales) -> Config:
    """The settings with the deadline classes of the traffic and room for its backlog."""
    scheduler = msgspec.structs.replace(
        settings.scheduler, slo_class=classes([scale for scale, _ in scales]), max_queue=ROWS
    )
    return msgspec.structs.replace(settings, scheduler=scheduler)


def mix(text: str) -> Scales:
    """`2.0`, `none`, or `1.5:1,8:1`, weights behind the colon."""
    found = []
    for part in text.split(","):
        scale, _, weight = part.partition(":")
        try:
            found.append((None if scale == "none" else float(scale), float(weight or 1)))
        except ValueError as error:
            raise ConfigError(f"--deadline {text!r}: write 2.0, none, or a mix such as 1.5:1,8:1") from error
    if not all(scale is None or 0.01 <= scale <= 1000 for scale, _ in found):
        raise ConfigError(f"--deadline {text!r}: multiples lie between 0.01 and 1000")
    if not all(0 < weight < math.inf for _, weight in found):
        raise ConfigError(f"--deadline {text!r}: weights are positive numbers")
    return tuple(found)


def traffic(extras: argparse.Namespace, profile: ModelProfile, scales: Scales, limit: int) -> tuple[list[Job], int]:
    """The requests, and how many of them are shorter than asked because the canvas is."""
    if extras.rate * extras.seconds > MOST_REQUESTS:
        raise ConfigError(f"--rate times --seconds is above {MOST_REQUESTS} requests; lower one of them")
    names = tuple(extras.task.split(",")) if extras.task else tuple(profile.quality.tasks)
    for name in names:
        if name not in profile.quality.tasks:
            raise ConfigError(f"--task {name!r} is not in the profile; it knows {', '.join(profile.quality.tasks)}")
    if len(names) > 1:
        names = tuple(name for name in names if name != ANY)
    if extras.trace:
        times = workload.scaled(workload.trace(extras.trace), extras.rate)
    else:
        if extras.prompt + extras.answer > limit:
            raise ConfigError(
                f"--prompt {extras.prompt} and --answer {extras.answer} exceed the canvas of {limit} tokens; "
                "lower them or raise --max-model-len"
            )
        rng = random.Random(extras.sim_seed)
        arrivals = workload.arrivals(extras.arrivals, extras.rate, rng)
        times = zip(arrivals, itertools.repeat(extras.prompt), itertools.repeat(extras.answer), strict=False)
    asked, times = itertools.tee(times)
    jobs = workload.jobs(times, extras.seconds, limit, names, scales, extras.sim_seed, extras.on_miss)
    jobs = [job._replace(shared=min(extras.shared_prompt, job.prompt_tokens)) for job in jobs]
    cut = sum(
        job.prompt_tokens < prompt or job.max_tokens < answer
        for job, (_, prompt, answer) in zip(jobs, asked, strict=False)
    )
    return jobs, cut
