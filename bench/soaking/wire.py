"""Raw HTTP/1.1 over a socket: send any bytes, read what comes back, and judge it as an answer of this server."""

import asyncio
import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

WITHIN = 60.0  # seconds until all answers of a case
LONGEST_MESSAGE = 1000  # characters; an error that echoes its request is longer
DOCUMENTED = {503: ("unavailable", "draining", "overloaded", "inflight", "queue_full"), 504: ("deadline",)}


class Case(NamedTuple):
    """What one client does: sends `parts` with `pause` seconds in between, then waits, shuts its side or leaves.

    `answers` counts the answers that must come; `methods` those of the requests, which tell whether bodies follow.
    """

    kind: str
    parts: Sequence[bytes]
    answers: int = 1
    methods: Sequence[str] = ("POST",)
    pause: float = 0.0
    then: str = "wait"  # or "shut", "leave"
    patience: float = WITHIN  # seconds to wait for what may come


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Outcome(NamedTuple):
    answers: list[Answer]
    faults: list[str]


def message(
    method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, **more: str
) -> bytes:
    """One request as bytes, with length and JSON's content type unless `headers` (or `more`) say otherwise."""
    lines = {"host": "soak", **({} if body is None else {"content-type": "application/json"})}
    lines |= {name.replace("_", "-"): value for name, value in ((headers or {}) | more).items()}
    if body is not None and "transfer-encoding" not in lines:
        lines.setdefault("content-length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + (body or b"")


async def exchange(host: str, port: int, case: Case) -> Outcome:
    """Do what the case says on a connection of its own; faults say what was wrong with the answers."""
    answers: list[Answer] = []
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    except OSError as error:
        return Outcome(answers, [f"cannot connect: {error}"])
    sending = asyncio.create_task(send(writer, case))
    broken = ""
    try:
        if case.then == "leave":
            await sending
            with contextlib.suppress(TimeoutError, OSError):
                await asyncio.wait_for(reader.read(1), case.patience)
            return Outcome(answers, [])
        async with asyncio.timeout(case.patience):
            for method in case.methods:
                answers.append(await answer(reader, method))
                if answers[-1].headers.get("connection", "").lower() == "close":
                    break
    except TimeoutError:
        broken = f"no whole answer within {case.patience:g} s"
    except (OSError, EOFError, ValueError, IndexError) as error:
        broken = f"no whole answer: {type(error).__name__} {error}"
    finally:
        sending.cancel()
        writer.transport.abort()
        await asyncio.gather(sending, return_exceptions=True)
    closed = bool(answers) and answers[-1].headers.get("connection", "").lower() == "close"
    missing = len(answers) < case.answers and not closed
    return Outcome(answers, [fault for found in answers for fault in faults(found)] + [broken] * missing)


async def send(writer: asyncio.StreamWriter, case: Case) -> None:
    with contextlib.suppress(OSError):  # the answer may come, and the connection end, before all is sent
        for part in case.parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(case.pause)
        if case.then == "shut":
            writer.write_eof()


async def answer(reader: asyncio.StreamReader, method: str) -> Answer:
    """Read one answer; 1xx answers before it are skipped."""
    status, headers = 100, dict[str, str]()
    while status < 200:
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        version, number, *_ = line.split(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not a status line: {line[:60]!r}")
        status = int(number)
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
    return Answer(status, headers, b"" if method == "HEAD" or status in (204, 304) else await body(reader, headers))


async def body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(parts)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()


def faults(answer: Answer) -> list[str]:
    """What is wrong with an answer, whatever was asked."""
    found = []
    if not answer.headers.get("x-request-id"):
        found.append(f"{answer.status} without x-request-id")
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return found + stream_faults(answer.body)
    if answer.status < 400 or not answer.body:
        return found
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return [*found, f"{answer.status} not in OpenAI's shape: {answer.body[:80]!r}"]
    found += [f"{answer.status}: {fault}" for fault in shape_faults(error)]
    if answer.status >= 500 and error.get("code") not in DOCUMENTED.get(answer.status, ()):
        found.append(f"undocumented {answer.status} {error.get('code')}: {str(error.get('message'))[:120]}")
    return found


def shape_faults(error: Any) -> list[str]:
    if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= set(error):
        return [f"not in OpenAI's shape: {str(error)[:80]}"]
    long = len(error["message"]) > LONGEST_MESSAGE
    return [f"a message of {len(error['message'])} characters: {error['message'][:80]}…"] if long else []


def stream_faults(body: bytes) -> list[str]:
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    errors = [json.loads(event)["error"] for event in events if event.startswith(b'{"error"')]
    found = [fault for error in errors for fault in shape_faults(error)]
    found += [f"undocumented error in a stream: {error}" for error in errors if error.get("type") == "server_error"]
    return found if errors or events[-1:] == [b"[DONE]"] else [*found, "a stream without [DONE]"]


def pattern(fault: str) -> str:
    """The fault without its numbers, to count equal ones together."""
    return re.sub(r"\d{4,}|0x[0-9a-f]+|[0-9a-f]{24}", "N", fault)
