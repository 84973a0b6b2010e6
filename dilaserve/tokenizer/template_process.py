"""The process that renders chat templates. A template comes with a model and is a program: it may never end, or grow.

The process bounds itself, so that the system ends or refuses what nothing in Python could: the CPU seconds of one
rendering by a timer whose signal kills, memory by a limit that makes allocations fail.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0  # CPU time of one rendering, compiling the template included
TOO_SLOW = signal.SIGPROF  # what ends the process after that
MEMORY = 512 * 2**20  # bytes that the process may have besides what it starts with
MOST_TEXT = 2**24  # characters of a rendered conversation
MOST_REASON = 200  # characters of what a template or the sandbox says when there is none


class Reply(msgspec.Struct, frozen=True):
    """A rendered conversation, or why there is none. `on_purpose`: the template itself rejects the messages."""

    text: str | None = None
    reason: str = ""
    on_purpose: bool = False


class Source(NamedTuple):
    """A template, what it may refer to besides messages, which is special tokens, and its CPU time for a rendering."""

    template: str
    tokens: dict[str, Any]
    seconds: float = SECONDS


def main(fd: int, source: Source) -> None:
    """Render one conversation after the other until nobody asks any more."""
    line: Connection[bytes, bytes] = Connection(fd)
    signal.signal(TOO_SLOW, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {TOO_SLOW})
    bound_memory()
    with contextlib.suppress(EOFError, OSError):  # the end of the line is the end of the process
        while True:
            line.send_bytes(msgspec.msgpack.encode(replied(source, line.recv_bytes())))


def bound_memory() -> None:
    """Data and address space; a kernel may count only one of them for what is allocated."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        _, hard = resource.getrlimit(kind)
        wanted = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def replied(source: Source, request: bytes) -> Reply:
    messages = msgspec.msgpack.decode(request)
    try:
        with timed(source.seconds):
            text = compiled(source.template).render(
                **{"tools": None, "documents": None, **source.tokens, "messages": messages}, add_generation_prompt=True
            )
    except MemoryError:
        return Reply(reason=f"it takes more than {MEMORY // 2**20} MiB")
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error)[:MOST_REASON].split())
        return Reply(reason=reason, on_purpose=type(error) is TemplateError)
    if len(text) > MOST_TEXT:
        return Reply(reason=f"it makes a text of {len(text)} characters and may make {MOST_TEXT}")
    return Reply(text)


@contextlib.contextmanager
def timed(seconds: float) -> Iterator[None]:
    """CPU time, not the clock's: a busy machine or a pause makes no template slower."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


@functools.cache
def compiled(template: str) -> Template:
    """A template as transformers reads it: the same names, and whitespace around blocks trimmed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


class Generation(Extension):
    """`{% generation %}`, which marks answers for training and shows nothing by itself."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body)


def to_json(value: Any, **layout: Any) -> str:
    """JSON as it is, where jinja's own filter escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **layout})


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
