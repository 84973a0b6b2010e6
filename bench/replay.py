"""Real servers under real HTTP load: start them, find what they carry, replay arrivals, and see what became of each."""

import asyncio
import contextlib
import functools
import itertools
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp

from dilaserve.profile.problems import TASKS, Problem, check, held_out
from dilaserve.profile.problems.problem import operations
from dilaserve.sim.workload import arrivals, scaled, trace
from dilaserve.types import OnMiss

MAX_TOKENS = 96
UNHURRIED = 1000.0  # a deadline that nobody misses
PATIENCE = 60.0  # seconds after the last arrival until what is still open counts as unanswered
POOL = 1600  # held-out problems a task and seed that runs draw from


class Traffic(NamedTuple):
    """How requests arrive, and of which tasks they are."""

    tasks: tuple[str, ...] = tuple(TASKS)
    arrivals: str = "poisson"
    trace: Path | None = None


class Ask(NamedTuple):
    at: float
    problem: Problem
    scale: float  # the deadline, in unloaded latencies of its class


class Fate(NamedTuple):
    ask: Ask
    latency: float | None  # None: declined or never answered
    met: bool
    right: bool
    drop: float
    threshold: float


@contextlib.asynccontextmanager
async def server(flags: Sequence[str], devices: str, model: str) -> AsyncIterator[str]:
    """A server process of its own; gives its address."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the server below
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


async def replay(
    address: str,
    asks: Sequence[Ask],
    unloaded: dict[str, float],
    patience: float = PATIENCE,
    tenant: str = "",
    on_miss: OnMiss = "cancel_when_late",
) -> list[Fate]:
    """Ask every problem at its time; `tenant` owns the accuracy budget."""
    timeout = aiohttp.ClientTimeout(total=patience)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as session:
        began = time.perf_counter()
        return list(await asyncio.gather(*(one(session, ask, unloaded, began, tenant, on_miss) for ask in asks)))


def chat(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.prompt}]


async def one(
    session: aiohttp.ClientSession, ask: Ask, unloaded: dict[str, float], began: float, tenant: str, on_miss: OnMiss
) -> Fate:
    await asyncio.sleep(max(0.0, began + ask.at - time.perf_counter()))
    deadline = ask.scale * unloaded[class_of(ask.problem)]
    slo = {"deadline_ms": 1000 * deadline, "task": ask.problem.task, "on_miss": on_miss}
    body = {"messages": chat(ask.problem), "max_tokens": MAX_TOKENS, "slo": slo, "user": tenant}
    sent = time.perf_counter()
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


def asks(traffic: Traffic, rate: float, scales: Sequence[float], seed: int, seconds: float) -> list[Ask]:
    """Problems of the tasks at random, at the arrival times of the trace or the process; other loads ask others."""
    rng = random.Random(f"{seed} {rate:.4f}")
    if traffic.trace:
        times = (at for at, _, _ in scaled(trace(traffic.trace), rate, start=0.1 * seed))
    else:
        times = arrivals(traffic.arrivals, rate, rng)
    pools = {task: itertools.cycle(turned(pool(task, seed), rng)) for task in traffic.tasks}
    found = itertools.takewhile(lambda at: at < seconds, times)
    return [Ask(at, next(pools[rng.choice(traffic.tasks)]), rng.choice(scales)) for at in found]


@functools.cache
def pool(task: str, seed: int) -> list[Problem]:
    return held_out(task, POOL, seed=seed + 1)


def turned(problems: list[Problem], rng: random.Random) -> list[Problem]:
    start = rng.randrange(len(problems))
    return problems[start:] + problems[:start]


def class_of(problem: Problem) -> str:
    """The task, and how many operations there are to write where a task asks for several."""
    return f"{problem.task} {len(operations(problem.answer))}".removesuffix(" 0")


async def unloaded_latency(address: str, count: int) -> dict[str, float]:
    """Median seconds of one request alone, by class; a class has at least `count` requests."""
    warm_up = [problem for task in TASKS for problem in held_out(task, 5, seed=98)]
    for problem in warm_up:
        await alone(address, problem)
    found: dict[str, list[float]] = {}
    for task in TASKS:
        pool = held_out(task, 40 * count, seed=99)
        classes = {class_of(problem) for problem in pool}
        for problem in pool:
            mine = found.setdefault(class_of(problem), [])
            if len(mine) < count:
                mine.append(await alone(address, problem))
            if all(len(found.get(name, ())) == count for name in classes):
                break
    return {name: statistics.median(seconds) for name, seconds in found.items()}


async def alone(address: str, problem: Problem) -> float:
    """Seconds of one request that nobody disturbs."""
    fates = await replay(address, [Ask(0.0, problem, UNHURRIED)], {class_of(problem): 1.0})
    assert fates[0].latency is not None
    return fates[0].latency


async def saturation(address: str, traffic: Traffic, unloaded: dict[str, float], count: int) -> float:
    """Requests a second that a server finishes while more are waiting: of `count` at once, the middle three fifths."""
    flood = [ask._replace(at=0.0) for ask in asks(traffic, float(count), [UNHURRIED], 7, 2.0)][:count]
    fates = await replay(address, flood, unloaded, 10 * PATIENCE)
    return middle_rate([fate.latency for fate in fates if fate.latency is not None])


def middle_rate(ends: Sequence[float]) -> float:
    """How many things ended in a second, of the middle three fifths."""
    ordered = sorted(ends)
    low, high = int(0.2 * len(ordered)), int(0.8 * len(ordered))
    return (high - low) / (ordered[high] - ordered[low])


class Spent(NamedTuple):
    """Seconds of device time by the server's own count: on requests that ended, and on those that missed."""

    device: float
    wasted: float


async def spent(address: str) -> Spent:
    async with aiohttp.ClientSession(address) as session, session.get("/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines() if not line.startswith("#"))
    return Spent(float(lines["dilaserve_device_seconds_total"]), float(lines["dilaserve_wasted_seconds_total"]))
