"""`dilaserve chat [URL]`: questions from the terminal or a pipe, answers that denoise while they are watched.

Lines that begin with a slash are commands; everything else is asked, with the history before it.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import aiohttp
import msgspec

from dilaserve.client.endpoint import CHAT, Slot, canvas_of, chunks, first_model, opened, reason, root_of, spoken
from dilaserve.errors import ConfigError, DilaserveError

Json = dict[str, Any]
HELP = "/reset forgets the conversation, /threshold 0.7 and /deadline 800 (ms) set or, alone, unset; Ctrl-D ends"
MASKED = "\N{MIDDLE DOT}"  # shown for a masked position
STYLES = ((0.9, "green"), (0.6, "yellow"), (0.0, "red"))  # by the least confidence


class Conversation(msgspec.Struct):
    """What is said so far, and what each request asks for besides."""

    model: str
    ours: bool  # whether the server takes our fields
    messages: list[Json] = []
    threshold: float | None = None
    deadline_ms: float | None = None

    def body(self, question: str) -> Json:
        options: Json = {"include_usage": True}
        more: Json = {}
        if self.ours:
            options["include_canvas"] = True
            more = {"confidence_threshold": self.threshold} if self.threshold is not None else {}
            more |= {"slo": {"deadline_ms": self.deadline_ms}} if self.deadline_ms is not None else {}
        said = [*self.messages, {"role": "user", "content": question}]
        return {"model": self.model, "messages": said, "stream": True, "stream_options": options} | more

    def answered(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> str:
        """Carry out a line with a slash; gives the sentence to show."""
        name, _, value = line.partition(" ")
        match name:
            case "/reset":
                self.messages.clear()
                return "the conversation is forgotten"
            case "/threshold" | "/deadline":
                return self.set(name[1:], value.strip())
            case _:
                return HELP

    def set(self, name: str, value: str) -> str:
        if not self.ours:
            return f"this server is not DiLaServe and knows no {name}"
        try:
            number = float(value) if value else None
        except ValueError:
            return f"{value!r} is no number"
        if name == "threshold":
            self.threshold = number
        else:
            self.deadline_ms = number
        return f"{name}: {'as the server decides' if number is None else value}"


class Piece(NamedTuple):
    """What a chunk tells: text that stays, and the open block after it."""

    text: str
    block: list[Slot]


async def answer(session: aiohttp.ClientSession, url: str, body: Json) -> AsyncIterator[Piece]:
    """The pieces of an answer. Raises `DilaserveError` with the server's sentence."""
    try:
        async with session.post(url + CHAT, json=body) as response:
            if response.status != 200:
                raise DilaserveError(reason(await response.text()))
            async for chunk in chunks(response):
                if "error" in chunk:
                    raise DilaserveError(reason(msgspec.json.encode(chunk).decode()))
                yield Piece(spoken(chunk), canvas_of(chunk))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise DilaserveError(f"the server ended the answer: {error}") from error


async def chat(extras: argparse.Namespace) -> None:
    """Ask line by line until the input ends. Raises `ConfigError` where no server answers."""
    url = root_of(extras.url)
    async with opened(extras.api_key) as session:
        card = await first_model(session, url)
        talk = Conversation(extras.model or str(card["id"]), card.get("owned_by") == "dilaserve")
        watched = sys.stdin.isatty() and sys.stdout.isatty()
        if watched:
            print(f"{talk.model} on {url}. {HELP}")
        answering: set[asyncio.Task[str]] = set()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted, answering)
        async for line in lines(watched):
            if line.startswith("/"):
                print(talk.command(line), file=sys.stdout if watched else sys.stderr, flush=True)
            elif line:
                await exchanged(answer(session, url, talk.body(line)), talk, line, watched, answering)


async def lines(watched: bool) -> AsyncIterator[str]:
    """Lines of the input. Reading waits in a thread, so that the connection stays alive meanwhile."""
    while True:
        try:
            line = await asyncio.to_thread(input, "> " if watched else "")
        except EOFError:
            return
        yield line.strip()


def interrupted(answering: set[asyncio.Task[str]]) -> None:
    """Ctrl-C cancels the answer that comes; at the prompt it says how to end."""
    for task in answering:
        task.cancel()
    if not answering:
        print("\nCtrl-D ends the chat\n> ", end="", flush=True)


async def exchanged(
    pieces: AsyncIterator[Piece], talk: Conversation, question: str, watched: bool, answering: set[asyncio.Task[str]]
) -> None:
    """One question and its answer, which may be cancelled; only whole answers enter the history."""
    answering.add(task := asyncio.ensure_future(shown(pieces, watched)))
    try:
        talk.answered(question, await task)
    except asyncio.CancelledError:
        print("(cancelled)", flush=True)
    except DilaserveError as error:
        print(f"dilaserve: {error.message}", file=sys.stderr, flush=True)
    finally:
        answering.discard(task)


async def shown(pieces: AsyncIterator[Piece], watched: bool) -> str:
    """Show an answer as it comes; gives its text."""
    text = ""
    with (drawing if watched else plain)() as show:
        async for piece in pieces:
            text += piece.text
            show(text, piece.block)
    if not watched:
        print(text, flush=True)
    return text


Show = Callable[[str, list[Slot]], None]


@contextlib.contextmanager
def plain() -> Iterator[Show]:
    yield lambda text, block: None


@contextlib.contextmanager
def drawing() -> Iterator[Show]:
    """The text, and after it the open block in colours of its confidence."""
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=30, vertical_overflow="visible") as live:

        def show(text: str, block: list[Slot]) -> None:
            drawn = Text(text)
            for slot in block:
                drawn.append(MASKED if slot.text is None else slot.text, "dim" if slot.text is None else style(slot))
            live.update(drawn)

        yield show


def style(slot: Slot) -> str:
    return next(colour for least, colour in STYLES if slot.confidence >= least)


def run(extras: argparse.Namespace) -> None:
    """The command. Raises `ConfigError`."""
    if extras.api_key == "":
        raise ConfigError("--api-key is empty; leave it out where the server needs none")
    asyncio.run(chat(extras))
