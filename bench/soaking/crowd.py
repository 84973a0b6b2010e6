"""The clients of `soak mixed`: each asks again and again until the end, and notes what was wrong."""

import asyncio
import json
import random
import time
from collections import Counter
from typing import Any, NamedTuple

import aiohttp

from soaking.asking import COMPLETIONS, Known, Outcome, asked, judged
from soaking.cases import WEIGHTS, case
from soaking.processes import Server
from soaking.wire import exchange

CHAT = "/v1/chat/completions"
TENANTS = 5
DEADLINES = (5, 100, 500, 3000, 60_000)  # milliseconds
MISSES = ("best_effort", "reject", "cancel_when_late")
COUNTED = ("slo", "deadline")  # words of cases that would bring deadlines which nobody here counts
BEHIND = ("priority",)  # of cases that may wait for minutes behind others, as they ask for
KINDS = {kind: weight for kind, weight in WEIGHTS.items() if kind not in ("plans", "compressed", "chunked")}
BROKEN = (LookupError, ValueError, TimeoutError, aiohttp.ClientError)


class Seen(NamedTuple):
    """What the clients saw. `deadlines` counts requests with a deadline by what became of them."""

    sent: Counter[str]
    deadlines: Counter[str]
    faults: list[str]


class Soak(NamedTuple):
    server: Server
    session: aiohttp.ClientSession
    known: list[Known]
    end: float  # by time.monotonic()
    seed: int
    seen: Seen

    def on(self) -> bool:
        return self.server.up and time.monotonic() < self.end


async def exact(soak: Soak, number: int) -> None:
    """Whole answers, each compared with the undisturbed one."""
    rng = random.Random(f"{soak.seed} {number}")
    while soak.on():
        one = rng.choice(soak.known)
        soak.seen.sent["exact"] += 1
        try:
            outcome = judged(one, *await asked(soak.session, one.body))
        except BROKEN as error:
            await noted(soak, "exact", error)
            continue
        if outcome is not Outcome.RIGHT:
            soak.seen.faults.append(f"wrong answer to {one.body}")


async def streaming(soak: Soak, number: int) -> None:
    """The same as streams."""
    rng = random.Random(f"{soak.seed} {number}")
    while soak.on():
        one = rng.choice(soak.known)
        soak.seen.sent["streamed"] += 1
        try:
            text = await streamed(soak.session, one.body)
        except BROKEN as error:
            await noted(soak, "stream", error)
            continue
        if text != one.text:
            soak.seen.faults.append(f"wrong stream for {one.body}")


async def streamed(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
    async with session.post(COMPLETIONS, json=body | {"stream": True}) as response:
        lines = (await response.text()).split("\n\n")
    if response.status != 200 or lines[-2:] != ["data: [DONE]", ""]:
        raise LookupError(f"{response.status} {lines[-2:]}")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line.startswith("data: ")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def deadlines(soak: Soak, number: int) -> None:
    """Chats of several tenants with all kinds of deadlines; each has one fate."""
    rng = random.Random(f"{soak.seed} {number}")
    while soak.on():
        slo = {"deadline_ms": rng.choice(DEADLINES), "on_miss": rng.choice(MISSES)}
        chat = [{"role": "user", "content": f"Reverse: {rng.choice(['lamu', 'tiko', 'sena'])}"}]
        body = {"messages": chat, "max_tokens": rng.randint(4, 32), "slo": slo, "user": f"t{rng.randrange(TENANTS)}"}
        soak.seen.sent["with deadline"] += 1
        try:
            fate = await fate_of(soak.session, body)
        except BROKEN as error:
            soak.seen.deadlines["unknown"] += 1
            await noted(soak, "deadline", error)
            continue
        soak.seen.deadlines[fate] += 1
        if fate not in ("met", "missed", "declined", "given up"):
            soak.seen.faults.append(f"deadline: {fate}")


async def fate_of(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
    async with session.post(CHAT, json=body) as response:
        answer = await response.json()
    if response.status == 200:
        return "met" if answer["dilaserve"]["deadline_met"] else "missed"
    fates = {(429, "deadline"): "declined", (504, "deadline"): "given up"}
    code = answer["error"]["code"]
    return fates.get((response.status, code), f"{response.status} {code}: {answer['error']['message'][:200]}")


async def leaving(soak: Soak, number: int) -> None:
    """Streams that are left after their first bytes."""
    rng = random.Random(f"{soak.seed} {number}")
    while soak.on():
        body = rng.choice(soak.known).body | {"stream": True, "n": rng.choice([1, 3])}
        soak.seen.sent["left"] += 1
        try:
            async with soak.session.post(COMPLETIONS, json=body) as response:
                await response.content.read(1)
                response.close()
        except BROKEN as error:
            await noted(soak, "leaving", error)


async def fuzzing(soak: Soak, number: int) -> None:
    """Cases of `soak fuzz` without deadlines."""
    for count in range(10**9):
        if not soak.on():
            return
        mine = case(soak.seed, 10**6 * number + count, KINDS)
        if any(word.encode() in b"".join(mine.parts) for word in COUNTED + BEHIND):
            continue
        soak.seen.sent["fuzzed"] += 1
        outcome = await exchange(soak.server.host, soak.server.port, mine)
        soak.seen.faults.extend(f"fuzz {mine.kind}: {fault}" for fault in outcome.faults)


async def noted(soak: Soak, what: str, error: Exception) -> None:
    soak.seen.faults.append(f"{what}: {type(error).__name__} {str(error)[:300]}")
    await asyncio.sleep(0.1)  # a server that has gone refuses at once
