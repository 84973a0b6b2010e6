"""What routing buys: deadlines met behind each rule, among equal and unequal nodes, and what decisions cost.

    python bench/routing.py [--nodes 16] [--devices 8] [--loads .7,1,1.3] [--seeds 3] [--seconds 3]

Several engines on one virtual clock (`dilaserve simulate --nodes`), the same arrivals for every rule; LLaDA-8B on
H200s, from data sheets, each device an instance. Arrivals are Poisson; prompts and answers have lognormal lengths, or
those of a trace. 1.0x is the rate at which a lone node of --devices devices, without a router, meets 90 % of its
deadlines, for each so many devices. Half of the unequal nodes have half the devices. A request is cancelled when its
deadline passes. What arrives in the first 1.25 and the last .25 seconds is left out. Runs are independent, and --jobs
of them run at once.
"""

import argparse
import itertools
import math
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from dilaserve.calibrate.calibrate import machine
from dilaserve.cli import parsed
from dilaserve.profile.decode_speed import ANY
from dilaserve.sim import workload
from dilaserve.sim.command import mix, prepared
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.nodes import REPORT_EVERY, ROUTING_DELAY, Node, node_seed, simulate_nodes
from dilaserve.sim.quote import Quote
from dilaserve.sim.report import quantile
from dilaserve.sim.router import NodeReport, Router, Sent
from dilaserve.sim.routing import RULES, best_quote
from dilaserve.sim.run import Outcome, pretended, simulate
from dilaserve.sim.workload import Job

LIMIT = 4096
WARM_UP, TAIL = 1.25, 0.25  # seconds at the start and before the end of arrivals that are left out
PROMPTS, ANSWERS = (400.0, 1.0, 2048), (128.0, 0.8, 1024)  # tokens: the median, the spread of the logarithm, the most
GOOD = 0.9  # share of deadlines that a lone node meets at 1.0x
HALVINGS, LEAST, MOST = 6, 10.0, 80.0  # requests a second between which 1.0x is looked for
WORTH = 2.0  # points over p2c from which a router of our own would be worth shipping
COUNTS = (1, 16, 64, 256, 1024)  # nodes for which decisions are timed
CONSOLE = Console(stderr=True)


class Traffic(NamedTuple):
    """How long requests are and when they are due, and how often nodes report; `trace` None for made lengths."""

    seconds: float
    deadline: str
    trace: Path | None
    report_every: float


class Cell(NamedTuple):
    """One run: `rate` is that of all nodes together."""

    fleet: tuple[int, ...]
    rule: str
    load: float
    rate: float
    seed: int


class Found(NamedTuple):
    """Of one run: requests counted, share of deadlines met, latencies of answers in order; seconds of this machine.

    `took` is wall time, `busy` that of its core.
    """

    requests: int
    met: float
    latencies: list[float]
    per_decision: float
    per_quote: float
    took: float
    busy: float


def jobs(traffic: Traffic, rate: float, seed: int) -> list[Job]:
    rng = random.Random(f"{seed} {rate:.4f}")
    known = [(prompt, answer) for _, prompt, answer in workload.trace(traffic.trace)] if traffic.trace else []
    times = ((at, *(rng.choice(known) if known else made(rng))) for at in workload.poisson(rate, rng))
    return workload.jobs(times, traffic.seconds, LIMIT, (ANY,), mix(traffic.deadline), seed, "cancel_when_late")


def made(rng: random.Random) -> tuple[int, int]:
    """Tokens of a prompt and of an answer."""
    prompt, answer = (
        min(most, math.ceil(rng.lognormvariate(math.log(median), spread)))
        for median, spread, most in (PROMPTS, ANSWERS)
    )
    return prompt, answer


def node(traffic: Traffic, devices: int, seed: int) -> Node:
    settings, _ = parsed(["--plan", f"{devices}x1"], "serve")
    return Node(
        prepared(settings, mix(traffic.deadline)), pretended(llada_8b_h200(), devices, LIMIT, seed=seed), devices
    )


def alone(traffic: Traffic, devices: int, rate: float, seed: int) -> float:
    """The share of deadlines that a node without a router meets."""
    one = node(traffic, devices, seed)
    return met(counted(simulate(one.config, one.assemble, [ANY], jobs(traffic, rate, seed)).outcomes, traffic.seconds))


def capacity(traffic: Traffic, devices: int, seeds: int) -> float:
    """Requests a second at which a lone node meets `GOOD`, by bisection."""
    low, high = LEAST, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        share = statistics.fmean(alone(traffic, devices, middle, seed) for seed in range(seeds))
        low, high = (middle, high) if share >= GOOD else (low, middle)
    return (low + high) / 2


def run(cell: Cell, traffic: Traffic) -> Found:
    began, busy = time.perf_counter(), time.process_time()
    nodes = [node(traffic, devices, node_seed(cell.seed, place)) for place, devices in enumerate(cell.fleet)]
    asked = jobs(traffic, cell.rate, cell.seed)
    found, costs = simulate_nodes(
        nodes, cell.rule, [ANY], asked, ROUTING_DELAY, cell.seed, report_every=traffic.report_every
    )
    outcomes = counted(found.outcomes, traffic.seconds)
    return Found(
        len(outcomes),
        met(outcomes),
        sorted(outcome.latency for outcome in outcomes if outcome.latency is not None),
        costs.deciding / max(1, costs.decisions),
        costs.quoting / max(1, costs.quotes),
        time.perf_counter() - began,
        time.process_time() - busy,
    )


def counted(outcomes: Sequence[Outcome], seconds: float) -> list[Outcome]:
    return [outcome for outcome in outcomes if WARM_UP <= outcome.at < seconds - TAIL]


def met(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(bool(outcome.met) for outcome in outcomes) if outcomes else 0.0


# tables


class Measured(NamedTuple):
    """All runs of one fleet."""

    fleet: tuple[int, ...]
    found: dict[tuple[str, float], list[Found]]  # by rule and load, one for each seed

    def points(self, rule: str, load: float) -> list[float]:
        return [100 * one.met for one in self.found[rule, load]]

    def gains(self, rule: str, load: float, over: str) -> list[float]:
        """Points more than another rule, on the same arrivals."""
        pairs = zip(self.points(rule, load), self.points(over, load), strict=True)
        return [mine - other for mine, other in pairs]

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(rule for rule, _ in self.found))

    @property
    def loads(self) -> list[float]:
        return list(dict.fromkeys(load for _, load in self.found))


def named(fleet: Sequence[int]) -> str:
    counts = {devices: fleet.count(devices) for devices in sorted(set(fleet), reverse=True)}
    return " and ".join(f"{count} nodes of {devices} devices" for devices, count in counts.items())


def table(one: Measured) -> Iterator[str]:
    requests = ", ".join(f"{sum(f.requests for f in one.found[one.rules[0], load])} at {load:g}x" for load in one.loads)
    yield f"**{named(one.fleet)}**; requests counted: {requests}"
    yield ""
    yield "| rule | " + " | ".join(f"{load:g}x" for load in one.loads) + " |"
    yield "|---" * (len(one.loads) + 1) + "|"
    for rule in one.rules:
        yield f"| {rule} | " + " | ".join(cell(one, rule, load) for load in one.loads) + " |"
    yield ""


def cell(one: Measured, rule: str, load: float) -> str:
    """Mean and range of % met over the seeds; gain over p2c; p50 and p99 of the answers' latency."""
    points, gains = one.points(rule, load), one.gains(rule, load, "p2c")
    latencies = sorted(itertools.chain.from_iterable(found.latencies for found in one.found[rule, load]))
    gain = "" if rule == "p2c" else f", {statistics.fmean(gains):+.1f}"
    spread = f"({min(points):.1f} to {max(points):.1f}{gain})"
    return f"{statistics.fmean(points):.1f} {spread}; {quantile(latencies, 0.5):.2f}, {quantile(latencies, 0.99):.2f}"


def conclusion(some: Sequence[Measured]) -> Iterator[str]:
    for over in ("p2c", "p2c-weighted"):
        cells = [
            (statistics.fmean(gains := one.gains(rule, load, over)), gains, rule, load, one)
            for one in some
            if over in one.rules
            for rule in one.rules
            if rule not in ("p2c", over)
            for load in one.loads
        ]
        if cells:
            gain, gains, rule, load, one = max(cells, key=lambda cell: cell[0])
            each = ", ".join(f"{points:+.1f}" for points in gains)
            verdict = "above" if gain > WORTH else "below"
            yield (
                f"The largest gain over {over}: {rule}, {gain:+.1f} points ({each} by seed) at {load:g}x on "
                f"{named(one.fleet)}; {verdict} the {WORTH:g} points from which a router would be worth shipping."
            )
            yield ""


# what decisions cost


def decision(rule: str, count: int, devices: int, times: int) -> float:
    """Seconds of a decision among so many nodes, with the book kept; quotes come from elsewhere."""
    router, rng = Router([devices] * count, rule), random.Random(0)
    for place in range(count):
        router.reported(place, NodeReport(0.0, rng.uniform(0, 20), rng.uniform(0, 8)))
    began = time.perf_counter()
    for at in range(times):
        nodes = router.choose()
        quotes = [Quote(True, 0.9, rng.random()) for _ in nodes]
        chosen = best_quote(router.known, nodes, quotes) if len(nodes) > 1 else nodes[0]
        router.sent(chosen, Sent(at, 1.0, 0.5))
    return (time.perf_counter() - began) / times


def costs(devices: int, rate: float, some: Sequence[Measured]) -> Iterator[str]:
    yield "**What a decision takes**, µs, beside the decisions and reports a second that so many nodes bring at 1.0x"
    yield ""
    yield "| nodes | decisions a second | reports a second | " + " | ".join(RULES) + " | most, % of one core |"
    yield "|---" * (len(RULES) + 4) + "|"
    for count in COUNTS:
        each = {rule: decision(rule, count, devices, 2000) for rule in RULES}
        share = 100 * count * rate * max(each.values())
        cells = " | ".join(f"{1e6 * each[rule]:.1f}" for rule in RULES)
        yield f"| {count} | {count * rate:.0f} | {count / REPORT_EVERY:.0f} | {cells} | {share:.1f} |"
    yield ""
    quotes = [f.per_quote for one in some for (rule, _), found in one.found.items() if rule == "quote" for f in found]
    decisions = [f.per_decision for one in some for found in one.found.values() for f in found]
    yield (
        f"In the runs above a decision took {1e6 * statistics.median(decisions):.1f} µs in the median. A quote takes "
        f"{1e6 * statistics.median(quotes):.0f} µs of the node that is asked, and each request needs two. What a "
        "request takes alone, which least-backlog counts, is worked out beside the decision."
    )
    yield ""


# all of it


def measured(
    args: argparse.Namespace, traffic: Traffic, rate: float, fleet: tuple[int, ...], rules: Sequence[str]
) -> Measured:
    share = rate * sum(fleet) / args.devices
    cells = [
        Cell(fleet, rule, load, load * share, seed)
        for load, seed, rule in itertools.product(args.loads, range(args.seeds), rules)
    ]
    found: dict[tuple[str, float], list[Found]] = {(rule, load): [] for rule in rules for load in args.loads}
    with Progress(console=CONSOLE) as bar, ProcessPoolExecutor(args.jobs) as pool:
        task = bar.add_task(named(fleet), total=len(cells))
        for one, result in zip(cells, pool.map(run, cells, itertools.repeat(traffic)), strict=True):
            found[one.rule, one.load].append(result)
            bar.advance(task)
            bar.console.print(f"{one.rule} {one.load:g}x seed {one.seed}: {100 * result.met:.1f} % {result.took:.0f} s")
    return Measured(fleet, found)


def text(args: argparse.Namespace, traffic: Traffic, rate: float, some: Sequence[Measured], began: float) -> str:
    lengths = (
        traffic.trace.name
        if traffic.trace
        else (f"prompts of {PROMPTS[0]:g} and answers of {ANSWERS[0]:g} tokens in the median (lognormal)")
    )
    runs = [f for one in some for found in one.found.values() for f in found]
    lines = [
        "# What routing buys",
        "",
        f"`python {shlex.join(sys.argv)}` on {machine()}",
        "",
        f"LLaDA-8B on H200s from data sheets, one device an instance; Poisson arrivals, {lengths}; deadlines "
        f"{traffic.deadline}x. {traffic.seconds:g} s of virtual time a run, of which the first {WARM_UP:g} and the "
        f"last {TAIL:g} are left out; {args.seeds} seeds. 1.0x = {rate:.1f} requests/s for each {args.devices} "
        f"devices, where a lone node meets {100 * GOOD:.0f} %. {1000 * ROUTING_DELAY:g} ms to a node, a report every "
        f"{traffic.report_every:g} s.",
        "",
        "% of deadlines met, mean over the seeds (least to most, points over p2c on the same arrivals); p50 and p99 "
        "of the latency of answers in seconds",
        "",
    ]
    for one in some:
        lines += table(one)
    lines += conclusion(some)
    if set(args.rules) == set(RULES):
        lines += costs(args.devices, rate, some)
    lines.append(
        f"{(time.perf_counter() - began) / 60:.0f} minutes in all; {len(runs)} runs, {args.jobs} at once, of "
        f"{sum(f.took for f in runs) / 60:.0f} minutes together, in which they had a core for "
        f"{sum(f.busy for f in runs) / 60:.0f}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--nodes", type=lambda text: [int(part) for part in text.split(",")], default=[16])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--loads", type=numbers, default=[0.7, 1.0, 1.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--deadline", default="2.0", help="as `simulate --deadline`")
    parser.add_argument("--trace", type=Path, help="CSV of arrival_s,prompt_tokens,output_tokens, for its lengths")
    parser.add_argument("--report-every", type=float, default=REPORT_EVERY, help="seconds between reports of a node")
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES), help="(default: all)")
    parser.add_argument("--rate", type=float, help="requests a second at 1.0x, instead of measuring it")
    parser.add_argument("--jobs", type=int, default=None, help="runs at once (default: as many as there are cores)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing.md")
    args = parser.parse_args()
    args.jobs = args.jobs or len(os.sched_getaffinity(0))
    began = time.perf_counter()
    traffic = Traffic(args.seconds, args.deadline, args.trace, args.report_every)
    rate = args.rate or capacity(traffic, args.devices, 2 * args.seeds)
    CONSOLE.print(f"1.0x = {rate:.2f} requests/s for {args.devices} devices")
    some = []
    for count, equal in itertools.product(args.nodes, (True, False)):
        sizes = (args.devices,) if equal else (args.devices, args.devices // 2)
        fleet = tuple(itertools.islice(itertools.cycle(sizes), count))
        rules = [rule for rule in args.rules if not (equal and rule == "p2c-weighted")]  # the same as p2c there
        some.append(measured(args, traffic, rate, fleet, rules))
        page = text(args, traffic, rate, some, began)
        args.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
