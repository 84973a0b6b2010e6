"""A server process whose workers are killed under load; see `bench/soak.py`."""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter

import aiohttp

from soaking.asking import CACHES, Known, Outcome, asked, judged, undisturbed
from soaking.figures import Figure, none_of
from soaking.processes import Server, busy, serving

PATIENCE = 300.0  # seconds until a request counts as lost; while every new worker is killed, requests wait
BACK_WITHIN = 60.0  # seconds after the last kill in which the server must be ready again


async def kills(args: argparse.Namespace) -> list[Figure]:
    caches = list(CACHES) if args.cache == "mixed" else [args.cache]
    ends, seen, lost = list[str](), Counter[tuple[str, Outcome]](), list[str]()
    flags = ("--model", args.model, "--devices", ",".join(["cpu"] * args.workers), "--plan", f"{args.workers}x1")
    async with serving(flags, ends) as server, session_of(server) as session:
        known = await undisturbed(session, caches, args.tokens)
        with busy(args.busy):
            end = time.monotonic() + args.seconds
            clients = [client(session, known, random.Random(n), end, seen, lost) for n in range(args.clients)]
            killed, *_ = await asyncio.gather(strikes(server, end, args.every), *clients)
            back = await until_ready(server, session)
    for line in [*lost[:10], *ends]:
        print(f"- {line}")
    counts = {outcome: sum(count for (_, one), count in seen.items() if one is outcome) for outcome in Outcome}
    told = [
        Figure(f"answers, cache {cache}: {outcome.value}", f"{seen[cache, outcome]:,}")
        for cache in caches
        for outcome in (Outcome.RIGHT, Outcome.MOVED)
        if seen[cache, outcome]
    ]
    return [
        Figure("workers killed", f"{killed} in {args.seconds:g} s, {args.busy} cores kept busy by others"),
        Figure("answers", f"{seen.total():,} to {args.clients} clients", "above 0", seen.total() > 0),
        *told,
        none_of("wrong answers", counts[Outcome.WRONG]),
        none_of("lost requests", len(lost)),
        Figure("ready again after the last kill", back or "never", f"within {BACK_WITHIN:g} s", bool(back)),
        none_of("faults of the server's end", len(ends)),
    ]


def session_of(server: Server) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(f"http://{server.host}:{server.port}", timeout=timeout, connector=connector)


async def client(
    session: aiohttp.ClientSession,
    known: list[Known],
    rng: random.Random,
    end: float,
    seen: Counter[tuple[str, Outcome]],
    lost: list[str],
) -> None:
    while time.monotonic() < end:
        one = rng.choice(known)
        try:
            outcome = judged(one, *await asked(session, one.body))
        except (LookupError, TimeoutError, aiohttp.ClientError) as error:
            lost.append(f"lost: {type(error).__name__} {error}")
            await asyncio.sleep(0.1)  # a server that has gone refuses at once
            continue
        seen[one.cache, outcome] += 1


async def strikes(server: Server, end: float, every: float, seed: int = 1) -> int:
    """Kill a random worker at each interval, loading ones included; counts the kills."""
    count, rng = 0, random.Random(seed)
    while time.monotonic() < end and server.up:
        await asyncio.sleep(every)
        workers = server.workers()
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                count += 1
    return count


async def until_ready(server: Server, session: aiohttp.ClientSession) -> str:
    """Seconds until /ready says so, in words; empty if it does not in time."""
    began = time.monotonic()
    while server.up and time.monotonic() - began < BACK_WITHIN:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with session.get("/ready") as response:
                if response.status == 200:
                    return f"{time.monotonic() - began:.1f} s"
        await asyncio.sleep(0.1)
    return ""
