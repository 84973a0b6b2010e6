"""Open and closed load on an OpenAI endpoint. Times count from the moment a request was meant to be sent.

1 Every request gets its intended moment before anything is sent (a rate), or when one ends (a concurrency).
2 At that moment it is sent, whatever became of those before it.
3 Its times count from the intended moment: a client that lags does not hide how long users wait.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from dilaserve.client.endpoint import CHAT, chunks, reason, spoken


class Ask(NamedTuple):
    """A request to come; `at` is seconds after the start, None in a closed loop, where a free client sends it."""

    at: float | None
    prompt: str
    max_tokens: int


class Outcome(msgspec.Struct, frozen=True):
    """What became of a request; seconds from the intended moment, None where it did not come so far."""

    at: float
    lag: float  # seconds between the intended moment and the sending
    first: float | None
    end: float | None
    tokens: int
    error: str | None
    met: bool | None  # by the client's clock; None without a deadline


class Target(NamedTuple):
    """Where requests go and what each of them says besides its prompt."""

    url: str
    model: str
    body: dict[str, Any]
    headers: dict[str, str]
    deadline: float | None


Seen = Callable[[Outcome], None]


async def run(
    session: aiohttp.ClientSession,
    target: Target,
    asks: Sequence[Ask],
    concurrency: int | None,
    limit: float,
    seen: Seen,
) -> None:
    """Send every request, at its moment or as one of `concurrency` clients; `seen` gets each outcome.

    Nothing is sent after `limit` seconds in a closed loop. Cancelling it leaves what was seen so far.
    """
    began = time.perf_counter()
    waiting = iter(asks)

    async def client(mine: Iterator[Ask]) -> None:
        for each in mine:
            now = time.perf_counter() - began
            if each.at is None and now >= limit:
                return
            seen(await one(session, target, each, began, now if each.at is None else each.at))

    async with asyncio.TaskGroup() as group:
        for each in range(concurrency) if concurrency else asks:
            group.create_task(client(waiting if isinstance(each, int) else iter([each])))


async def one(session: aiohttp.ClientSession, target: Target, ask: Ask, began: float, at: float) -> Outcome:
    """Ask at `at` seconds after `began`, read the stream to its end."""
    await asyncio.sleep(max(0.0, began + at - time.perf_counter()))

    def since() -> float:
        return time.perf_counter() - began - at

    lag, tokens = since(), 0
    first: float | None = None
    error: str | None = None
    counted: int | None = None
    message = [{"role": "user", "content": ask.prompt}]
    body = {"model": target.model, "messages": message, "max_tokens": ask.max_tokens, "stream": True} | target.body
    try:
        async with session.post(target.url + CHAT, json=body, headers=target.headers) as response:
            if response.status != 200:
                error = f"HTTP {response.status}"
                await response.read()
            else:
                async for chunk in chunks(response):
                    if "error" in chunk:
                        error = f"in the stream: {reason(msgspec.json.encode(chunk).decode())}"[:80]
                    if spoken(chunk):
                        first = since() if first is None else first
                        tokens += 1
                    counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
    except TimeoutError:
        error = "timeout"
    except aiohttp.ClientConnectorError:
        error = "connection refused"
    except (aiohttp.ClientError, OSError) as broken:
        error = f"connection lost ({type(broken).__name__})"
    except ValueError:
        error = "not an event stream"
    end = None if error else since()
    met = None if target.deadline is None else end is not None and end <= target.deadline
    return Outcome(at, lag, first, end, tokens if counted is None else counted, error, met)


@contextlib.contextmanager
def collected(then: Seen) -> Iterator[tuple[list[Outcome], Seen]]:
    """A list of outcomes and what appends to it, and passes each on."""
    found: list[Outcome] = []

    def seen(outcome: Outcome) -> None:
        found.append(outcome)
        then(outcome)

    yield found, seen
