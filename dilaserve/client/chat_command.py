"""`dilaserve chat [URL]`: questions from the terminal or a pipe, answers that denoise while they are watched.

Lines that begin with a slash are commands; everything else is asked, with the history before it.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import sys
import termios
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import msgspec

from dilaserve.client.endpoint import CHAT, Slot, canvas_of, chunks, first_model, opened, reason, root_of, spoken
from dilaserve.errors import ConfigError, DilaserveError

if TYPE_CHECKING:
    from rich.console import Console

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
    """The pieces of an answer. Raises `DilaserveError` with the server's sentence, or what became of the server."""
    try:
        async with session.post(url + CHAT, json=body) as response:
            if response.status != 200:
                raise DilaserveError(reason(await response.text()))
            async for chunk in chunks(response):
                if "error" in chunk:
                    raise DilaserveError(reason(msgspec.json.encode(chunk).decode()))
                yield Piece(spoken(chunk), canvas_of(chunk))
    except aiohttp.ClientConnectorError as error:
        raise DilaserveError(f"no server answers at {url} any more") from error
    except (aiohttp.ClientError, OSError) as error:
        raise DilaserveError(f"the connection was lost before the answer was whole ({type(error).__name__})") from error
    except ValueError as error:
        raise DilaserveError(f"the server sent what is no event stream: {error}") from error


def chat(extras: argparse.Namespace) -> None:
    """Ask line by line until the input ends. Raises `ConfigError` where no server answers."""
    url, watched = root_of(extras.url), sys.stdin.isatty() and sys.stdout.isatty()
    with asyncio.Runner() as runner:
        card = runner.run(listed(url, extras.api_key))
        talk = Conversation(extras.model or str(card["id"]), card.get("owned_by") == "dilaserve")
        if watched:
            edit_lines()
            print(f"{talk.model} on {url}. {HELP}")
        for line in lines(watched):
            if line.startswith("/"):
                print(talk.command(line), file=sys.stdout if watched else sys.stderr, flush=True)
            elif line:
                exchanged(runner, asked(url, extras.api_key, talk.body(line), watched), talk, line)


async def listed(url: str, key: str | None) -> Json:
    async with opened(key) as session:
        return await first_model(session, url)


async def asked(url: str, key: str | None, body: Json, watched: bool) -> str:
    """Ask on a connection of its own, as one that waits while the user thinks may be closed; gives the answer."""
    async with opened(key) as session:
        return await shown(answer(session, url, body), watched)


def edit_lines() -> None:
    """Arrow keys edit the line and go through the earlier ones, where Python has its readline."""
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # which makes `input` do it


def lines(watched: bool) -> Iterator[str]:
    """Lines of the input, up to its end. At the prompt, Ctrl-C drops the line and says how to end."""
    while True:
        try:
            yield input("> " if watched else "").strip()
        except EOFError:
            if watched:
                print()
            return
        except KeyboardInterrupt:
            if not watched:
                raise
            print("\nCtrl-D ends the chat")


def exchanged(runner: asyncio.Runner, asking: Coroutine[Any, Any, str], talk: Conversation, question: str) -> None:
    """One question and its answer, which Ctrl-C cancels; only whole answers enter the history."""
    try:
        talk.answered(question, runner.run(asking))
    except KeyboardInterrupt:
        print("(cancelled)", flush=True)
    except DilaserveError as error:
        print(f"dilaserve: {error.message}", file=sys.stderr, flush=True)


async def shown(pieces: AsyncIterator[Piece], watched: bool) -> str:
    """Show an answer as it comes; gives its text."""
    text = ""
    with (drawing if watched else plain)() as show:
        try:
            async for piece in pieces:
                text += piece.text
                show(text, piece.block)
        finally:
            show(text, [])
    if not watched:
        print(text, flush=True)
    return text


Show = Callable[[str, list[Slot]], None]


@contextlib.contextmanager
def plain() -> Iterator[Show]:
    yield lambda text, block: None


@contextlib.contextmanager
def drawing(console: "Console | None" = None) -> Iterator[Show]:
    """The text, and after it the open block in colours of its confidence.

    A full line of text is printed for good, above what is drawn anew, as a terminal redraws nothing that has left it.
    """
    from rich.live import Live
    from rich.text import Text

    with unechoed(), Live(console=console, auto_refresh=False) as live:
        width, printed = live.console.width, 0

        def show(text: str, block: list[Slot]) -> None:
            nonlocal printed
            rows = Text(printable(text)).wrap(live.console, width) or [Text()]
            for row in rows[printed:-1]:
                live.console.print(row)
            printed = max(printed, len(rows) - 1)
            drawn = Text(rows[-1].plain.rstrip(" ") + " " * (len(text) - len(text.rstrip(" "))))
            for slot in block:
                drawn.append(*(MASKED, "dim") if slot.text is None else (printable(slot.text), style(slot)))
            live.update(Text("\n").join(drawn.wrap(live.console, width)[-live.console.height + 1 :]), refresh=True)

        yield show


def printable(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """What is typed meanwhile is not shown in what is drawn; it is read at the next prompt."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def style(slot: Slot) -> str:
    return next(colour for least, colour in STYLES if slot.confidence >= least)


def run(extras: argparse.Namespace) -> None:
    """The command. Raises `ConfigError`."""
    if extras.api_key == "":
        raise ConfigError("--api-key is empty; leave it out where the server needs none")
    chat(extras)
