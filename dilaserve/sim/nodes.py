"""Several engines on one virtual clock, each a node, and a router that sends every request to one of them.

1. A request reaches the router, which chooses nodes by its rule, from what it knows.
2. Where several remain it asks them for quotes: there and back.
3. The request travels to the node; what it has spent so far is taken off its deadline.
4. Its answer travels back; nodes report now and then, and these reports travel too.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import NamedTuple

import msgspec

from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble
from dilaserve.engine.engine import Engine
from dilaserve.errors import DilaserveError
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.quote import alone, quote
from dilaserve.sim.router import Router, Sent, node_report
from dilaserve.sim.routing import best_quote
from dilaserve.sim.run import Outcome, Run, ask, options_of, sent
from dilaserve.sim.workload import Job
from dilaserve.types import Quote

REPORT_EVERY = (
    0.3  # seconds between two reports of a node; statistics of Ray Serve 2.60's replicas were as old, measured
)
ROUTING_DELAY = 0.003  # seconds from the router to a node, or back; what a proxy within one data centre takes
SEEDS_APART = 1_000_003  # between nodes, so that no node of one run has the seed of another node in the next


class Node(NamedTuple):
    """One engine to come, and how many devices it has."""

    config: Config
    assemble: Assemble
    devices: int


class RoutingCosts(msgspec.Struct):
    """What routing has taken in real time, in seconds: decisions on the router, quotes on the nodes."""

    decisions: int = 0
    deciding: float = 0.0
    quotes: int = 0
    quoting: float = 0.0


class RoutedRun(NamedTuple):
    run: Run
    costs: RoutingCosts


def simulate_nodes(
    nodes: Sequence[Node],
    rule: str,
    tasks: Sequence[str],
    jobs: Sequence[Job],
    delay: float = ROUTING_DELAY,
    seed: int = 0,
    seen: Callable[[int], None] = lambda done: None,
    report_every: float = REPORT_EVERY,
) -> RoutedRun:
    """Run all jobs to their end behind a router with this rule (see `RULES`).

    `delay` is one way, in seconds; `report_every` are the seconds between two reports of a node.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(play(nodes, rule, tasks, jobs, delay, seed, seen, report_every))


async def play(
    nodes: Sequence[Node],
    rule: str,
    tasks: Sequence[str],
    jobs: Sequence[Job],
    delay: float,
    seed: int,
    seen: Callable[[int], None],
    report_every: float,
) -> RoutedRun:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Engine(node.config, assemble=node.assemble)) for node in nodes]
        routing = Routing(engines, Router([node.devices for node in nodes], rule, seed), tasks, delay)
        reporting = asyncio.create_task(routing.report(report_every))
        run = await sent(routing.send, engines, jobs, seen)
        reporting.cancel()
    return RoutedRun(run, routing.costs)


class Routing:
    """Does what the router decides, in virtual time; it decides nothing."""

    def __init__(self, engines: Sequence[Engine], router: Router, tasks: Sequence[str], delay: float) -> None:
        self.engines, self.router, self.tasks, self.delay = engines, router, tasks, delay
        self.loop = asyncio.get_running_loop()
        self.costs = RoutingCosts()

    async def send(self, job: Job, number: int) -> Outcome:
        """Route the job, and wait for its answer."""
        began = self.loop.time()
        node = await self.choose(job, began)
        self.book(node, job)
        await self.travel()
        outcome = await ask(self.engines[node], job, self.tasks, number, self.loop.time() - began)
        await self.travel()
        self.router.ended(node)
        return msgspec.structs.replace(outcome, node=node)

    async def choose(self, job: Job, began: float) -> int:
        watch = time.perf_counter()
        nodes = self.router.choose()
        self.costs.decisions += 1
        self.costs.deciding += time.perf_counter() - watch
        if len(nodes) == 1:
            return nodes[0]
        await self.travel()
        quotes = [self.quote(node, job, self.loop.time() - began) for node in nodes]
        await self.travel()
        return best_quote(self.router.known, nodes, quotes)

    def quote(self, node: int, job: Job, spent: float) -> Quote | None:
        watch = time.perf_counter()
        try:
            return quote(self.engines[node], job.prompt_tokens, options_of(job), spent)
        except DilaserveError:  # the node refuses it when it comes
            return None
        finally:
            self.costs.quotes += 1
            self.costs.quoting += time.perf_counter() - watch

    def book(self, node: int, job: Job) -> None:
        """Tell the router what it has sent: seconds as the node would expect them, and the share until the deadline."""
        seconds = self.alone(node, job)
        demand = 0.0 if job.scale is None else min(1.0, 1.0 / job.scale)
        watch = time.perf_counter()
        self.router.sent(node, Sent(self.loop.time() + self.delay, seconds, demand))
        self.costs.deciding += time.perf_counter() - watch

    def alone(self, node: int, job: Job) -> float:
        """Seconds that the node would expect the job to take alone."""
        try:
            return alone(self.engines[node], job.prompt_tokens, options_of(job))
        except DilaserveError:  # the node refuses it when it comes
            return 0.0

    async def travel(self) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)

    async def report(self, every: float) -> None:
        """Each node reports once in so many seconds, one after the other."""
        for node in itertools.cycle(range(len(self.engines))):
            await asyncio.sleep(every / len(self.engines))
            report = node_report(self.engines[node].scheduler.requests.values(), self.loop.time())
            self.loop.call_later(self.delay, self.router.reported, node, report)


def node_seed(seed: int, node: int) -> int:
    """The first node has the seed of a run without nodes."""
    return seed + SEEDS_APART * node
