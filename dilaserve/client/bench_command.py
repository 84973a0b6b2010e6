"""`dilaserve bench URL`: load on any OpenAI endpoint, from the flags to the report."""

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from dilaserve.client import load_report
from dilaserve.client.endpoint import first_model, opened, root_of
from dilaserve.client.load import Ask, Outcome, Target, collected, run
from dilaserve.errors import ConfigError
from dilaserve.sim.workload import arrivals, scaled, trace

WORDS = ("red", "green", "one", "two", "north", "south", "sun", "moon", "rain", "wind", "sand", "sea", "tree", "leaf")
Progress = Callable[[str, int, int], None]


class Done(NamedTuple):
    """The report's lines, the last of which write --out; `interrupted` by a signal, so that not all was sent."""

    lines: Iterator[str]
    interrupted: bool


class Driven(NamedTuple):
    """Outcomes in the order in which they came."""

    outcomes: list[Outcome]
    interrupted: bool


def bench(extras: argparse.Namespace, seen: Progress) -> Done:
    """Run the load. Raises `ConfigError`."""
    asks = planned(extras)
    outcomes, interrupted = asyncio.run(driven(extras, asks, seen))
    return Done(told(extras, outcomes, len(asks)), interrupted)


def told(extras: argparse.Namespace, outcomes: list[Outcome], count: int) -> Iterator[str]:
    """The report on the outcomes of so many requests; then it is saved."""
    deadline = None if extras.deadline_ms is None else extras.deadline_ms / 1000
    found = load_report.report(outcomes, count, deadline)
    yield from load_report.lines(found)
    if extras.out:
        whole = {"report": found, "url": extras.url, "outcomes": outcomes}
        (extras.out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
        load_report.plot(outcomes, deadline, extras.out / "report.png")
        yield f"report        {extras.out / 'report.json'}, {extras.out / 'report.png'}"


def planned(extras: argparse.Namespace) -> list[Ask]:
    """The requests, bounded by --requests and, with a rate or a trace, by --seconds."""
    rng = random.Random(extras.seed)
    texts = itertools.cycle(prompts(extras.prompts)) if extras.prompts else None
    if extras.concurrency:
        times: Iterator[tuple[float | None, int, int]] = itertools.repeat((None, extras.prompt, extras.answer))
    elif extras.trace:
        rows = trace(extras.trace)
        span = rows[-1][0] - rows[0][0]
        times = iter(scaled(rows, extras.rate or len(rows) / (span or 1.0)))
    else:
        every = arrivals(extras.arrivals, extras.rate or 1.0, rng)
        times = ((at, extras.prompt, extras.answer) for at in every)
    inside = itertools.takewhile(lambda each: each[0] is None or each[0] < extras.seconds, times)
    return [
        Ask(at, next(texts) if texts else made(words, rng), answer)
        for at, words, answer in itertools.islice(inside, extras.requests)
    ]


def prompts(file: Path) -> list[str]:
    """One prompt a line, as text or as JSON with `prompt`. Raises `ConfigError`."""
    try:
        rows = [line for line in file.read_text().splitlines() if line.strip()]
        found = [str(msgspec.json.decode(row)["prompt"]) if row.startswith("{") else row for row in rows]
    except OSError as error:
        raise ConfigError(f"cannot read the prompts {file}: {error.strerror}") from error
    except (ValueError, KeyError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} is not one prompt a line, or JSON lines with a field prompt: {error}") from error
    if not found:
        raise ConfigError(f"{file} has no prompts")
    return found


def made(words: int, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=words))


async def driven(extras: argparse.Namespace, asks: list[Ask], seen: Progress) -> Driven:
    """The outcomes; after Ctrl-C, or once the time is over, of the requests that ended by then."""
    url, interrupted = root_of(extras.url), False
    with collected(lambda outcome: seen("requests", len(outcomes), len(asks))) as (outcomes, add):
        async with opened(extras.api_key, extras.timeout) as session:
            card = await first_model(session, url)
            target = aimed(extras, url, extras.model or str(card["id"]), card.get("owned_by") == "dilaserve")
            work = asyncio.create_task(run(session, target, asks, extras.concurrency, extras.seconds, add))

            def interrupt() -> None:
                nonlocal interrupted
                interrupted = True
                work.cancel()

            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, interrupt)
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(work, extras.seconds + extras.timeout)
    return Driven(outcomes, interrupted)


def aimed(extras: argparse.Namespace, url: str, model: str, ours: bool) -> Target:
    """Deadlines are said to a server of ours only, unless --tell says how; the client judges them in any case."""
    tell = ("field" if ours else "none") if extras.tell == "auto" else extras.tell
    limit = extras.deadline_ms
    body = {"slo": {"deadline_ms": limit}} if limit and tell == "field" else {}
    headers = {"x-slo-deadline-ms": f"{limit:g}"} if limit and tell == "header" else {}
    usage = {"stream_options": {"include_usage": True}}
    return Target(url, model, usage | body, headers, limit / 1000 if limit else None)
