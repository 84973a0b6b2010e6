"""All kinds of traffic and trouble at once on one server process; see `bench/soak.py`."""

import argparse
import asyncio
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Coroutine

import aiohttp

from soaking import crowd
from soaking.asking import undisturbed
from soaking.counters import added_up, settled
from soaking.crowd import Seen, Soak
from soaking.figures import Figure, none_of
from soaking.kills import session_of, strikes, until_ready
from soaking.processes import ADMIN_KEY, Server, busy, serving

WARM_UP = 0.2  # share of the time before resident memory is compared
WINDOW = 0.1  # share of the time that each of the two compared medians covers
MOST_GROWTH = 0.01  # of resident memory, as a share
KILL_EVERY, PLAN_EVERY = 10.0, 5.0  # seconds
FLAGS = (
    *("--devices", "cpu,cpu", "--plan", "2x1", "--admin-key", ADMIN_KEY, "--max-queue", "4096"),
    *("--best-effort-share", "0.2"),  # clients without deadlines are answered within a minute
)
PLANS = ("1x2", "2x1")
KINDS: tuple[Callable[[Soak, int], Coroutine[None, None, None]], ...] = (
    *(crowd.exact, crowd.streaming, crowd.deadlines, crowd.deadlines, crowd.leaving, crowd.fuzzing),
)


async def mixed(args: argparse.Namespace) -> list[Figure]:
    ends, seen, seconds = list[str](), Seen(Counter(), Counter(), []), 60 * args.minutes
    async with serving(("--model", args.model, *FLAGS), ends) as server, session_of(server) as session:
        known = await undisturbed(session, ["none"], args.tokens)
        soak = Soak(server, session, known, time.monotonic() + seconds, args.seed, seen)
        with busy(args.busy):
            clients = [kind(soak, n) for n, kind in zip(range(args.clients), itertools.cycle(KINDS), strict=False)]
            sizes, killed, changed, *_ = await asyncio.gather(
                sampled(server, soak.end), strikes(server, soak.end, KILL_EVERY), changes(soak), *clients
            )
            back = await until_ready(server, session)
            metrics = await settled(session)
        traces = server.tracebacks()
    for line in [*seen.faults[:20], *traces[:10], *ends]:
        print(f"- {line}")
    return [
        Figure("time", f"{args.minutes:g} min, {args.clients} clients, {killed} kills, {changed} plan changes"),
        Figure("requests", ", ".join(f"{what}: {count:,}" for what, count in sorted(seen.sent.items()))),
        none_of("wrong answers, lost requests and other faults", len(seen.faults)),
        grown(sizes),
        *added_up(metrics, seen.deadlines, killed),
        Figure("ready after the last kill", back or "never", "", bool(back)),
        none_of("tracebacks in the log", len(traces)),
        none_of("faults of the server's end", len(ends)),
    ]


async def sampled(server: Server, end: float) -> list[int]:
    """Resident bytes of the server, once a second."""
    sizes = []
    while time.monotonic() < end and server.up:
        sizes.append(server.resident())
        await asyncio.sleep(1.0)
    return sizes


def grown(sizes: list[int]) -> Figure:
    """Growth from just after the warm-up to the end, as medians of two windows."""
    window, start = max(1, int(WINDOW * len(sizes))), int(WARM_UP * len(sizes))
    first, last = statistics.median(sizes[start : start + window]), statistics.median(sizes[-window:])
    share = last / first - 1
    told = f"{100 * share:+.2f} %, from {first / 2**20:.1f} to {last / 2**20:.1f} MiB"
    return Figure("growth of resident memory", told, f"below {100 * MOST_GROWTH:g} %", share < MOST_GROWTH)


async def changes(soak: Soak) -> int:
    count, headers = 0, {"authorization": f"Bearer {ADMIN_KEY}"}
    for plan in itertools.cycle(PLANS):
        await asyncio.sleep(PLAN_EVERY)
        if time.monotonic() >= soak.end or not soak.server.up:
            return count
        try:
            async with soak.session.post("/v1/plan", json={"plan": plan}, headers=headers) as response:
                count += response.status == 200
                if response.status >= 500 and response.status != 503:
                    soak.seen.faults.append(f"plan {plan}: {response.status} {(await response.text())[:200]}")
        except (TimeoutError, aiohttp.ClientError) as error:
            soak.seen.faults.append(f"plan {plan}: {type(error).__name__} {error}")
    return count
