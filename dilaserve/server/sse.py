"""Server-sent events: several streams of one request, merged, kept awake, and dropped when nobody reads."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from dilaserve.engine.engine import Chunk, Completion, Stream
from dilaserve.errors import DilaserveError
from dilaserve.server.connection import Connection
from dilaserve.server.responses import Json, cached
from dilaserve.types import Usage

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
PING_AFTER = 15.0  # seconds of silence before a comment line keeps proxies awake
STALLED_AFTER = 60.0  # seconds that a client may refuse to read
HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
PING = Chunk("")  # stands for a comment line
_json = msgspec.json.Encoder()


class AnswerFormat(Protocol):
    """How an endpoint writes answers: whole, or as events. `named`: each event says its type on a line of its own;
    `ending` stands behind the last.
    """

    named: bool
    ending: bytes

    def begin(self, streams: Sequence[Stream]) -> None: ...

    def answer(self, completions: Sequence[Completion], echoes: Sequence[str], prompt_tokens: int) -> Json: ...

    def started(self, choices: int, echoes: Sequence[str], prompt_tokens: int) -> Iterator[Json]: ...

    def more(self, index: int, chunk: Chunk) -> Iterator[Json]: ...

    def done(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Iterator[Json]: ...

    def failed(self, error: DilaserveError) -> Iterator[Json]: ...


async def relay(
    request: web.Request,
    form: AnswerFormat,
    streams: Sequence[Stream],
    echoes: Sequence[str],
    prompt_tokens: int,
) -> web.StreamResponse:
    """Write the streams as one event stream; errors after the first byte become an event."""
    response = web.StreamResponse(headers={**HEADERS, "x-request-id": request[REQUEST_ID]})
    await response.prepare(request)
    spent, usages = 0, list[Usage]()
    try:
        await write(response, written(form, form.started(len(streams), echoes, prompt_tokens)))
        async for index, chunk in merged(request, response, streams):
            spent += len(chunk.token_ids)
            usages += [chunk.usage] if chunk.usage else []
            await write(response, written(form, form.more(index, chunk)))
        last = form.done(prompt_tokens, spent, cached(usages))
        await write(response, written(form, last) + form.ending)
    except DilaserveError as error:
        await write(response, written(form, form.failed(error)))
    except TimeoutError:
        if request.transport:
            request.transport.abort()
    return response


def written(form: AnswerFormat, events: Iterable[Json]) -> bytes:
    return b"".join(event(one, one["type"] if form.named else None) for one in events)


def event(data: Json, name: str | None = None) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + _json.encode(data) + b"\n\n"


async def write(response: web.StreamResponse, data: bytes) -> None:
    """Raises `TimeoutError` when the client has stopped reading."""
    if data:
        async with asyncio.timeout(STALLED_AFTER):
            await response.write(data)


async def merged(
    request: web.Request, response: web.StreamResponse, streams: Sequence[Stream]
) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of all streams as they come, with the stream's index; pings while none comes, and when the connection
    asks whether anybody is there.
    """
    arrivals: asyncio.Queue[tuple[int, Chunk | DilaserveError | None]] = asyncio.Queue()
    ahead = asyncio.Semaphore(len(streams))  # chunks that are taken out of their streams before they are written
    if isinstance(request.protocol, Connection):
        request.protocol.probe = lambda: arrivals.put_nowait((0, PING))

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for chunk in stream:
                await ahead.acquire()
                arrivals.put_nowait((index, chunk))
            arrivals.put_nowait((index, None))
        except DilaserveError as error:
            arrivals.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            try:
                async with asyncio.timeout(PING_AFTER):
                    index, chunk = await arrivals.get()
            except TimeoutError:
                index, chunk = 0, PING
            if chunk is PING:
                await write(response, b": ping\n\n")
                continue
            if isinstance(chunk, DilaserveError):
                raise chunk
            left -= chunk is None
            if chunk is not None:
                yield index, chunk
                ahead.release()
    finally:
        for task in pumps:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*pumps, return_exceptions=True)
