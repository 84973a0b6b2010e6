"""Server-sent events: several streams of one request, merged, kept awake, and dropped when nobody reads."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from dilaserve.engine.engine import Chunk, Completion
from dilaserve.engine.stream import AnswerStream
from dilaserve.errors import DilaserveError
from dilaserve.server.http import HttpRequest, HttpResponse
from dilaserve.server.responses import Json, cached
from dilaserve.types import Usage

log = logging.getLogger(__name__)
PING_AFTER = 15.0  # seconds of silence before a comment line keeps proxies awake
EVENTS = "text/event-stream"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
PING = Chunk("")  # stands for a comment line
_json = msgspec.json.Encoder()


class AnswerFormat(Protocol):
    """How an endpoint writes answers: whole, or as events. `named`: each event says its type on a line of its own;
    `ending` stands behind the last.
    """

    named: bool
    ending: bytes

    def begin(self, streams: Sequence[AnswerStream]) -> None: ...

    def answer(self, completions: Sequence[Completion], echoes: Sequence[str], prompt_tokens: int) -> Json: ...

    def started(self, choices: int, echoes: Sequence[str], prompt_tokens: int) -> Iterator[Json]: ...

    def more(self, index: int, chunk: Chunk) -> Iterator[Json]: ...

    def done(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Iterator[Json]: ...

    def failed(self, error: DilaserveError) -> Iterator[Json]: ...


def relay(
    request: HttpRequest,
    form: AnswerFormat,
    streams: Sequence[AnswerStream],
    echoes: Sequence[str],
    prompt_tokens: int,
    resources: contextlib.AsyncExitStack,
) -> HttpResponse:
    """The streams as one event stream, which holds `resources` until it is closed."""
    return HttpResponse(
        headers=HEADERS,
        media_type=EVENTS,
        events=events(request, form, streams, echoes, prompt_tokens),
        resources=resources,
    )


async def events(
    request: HttpRequest, form: AnswerFormat, streams: Sequence[AnswerStream], echoes: Sequence[str], prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    """All events as they are written; errors become one."""
    spent, usages = 0, list[Usage]()
    try:
        yield written(form, form.started(len(streams), echoes, prompt_tokens))
        async with contextlib.aclosing(merged(request, streams)) as arrivals:
            async for index, chunk in arrivals:
                if chunk is PING:
                    yield b": ping\n\n"
                    continue
                spent += len(chunk.token_ids)
                usages += [chunk.usage] if chunk.usage else []
                yield written(form, form.more(index, chunk))
        yield written(form, form.done(prompt_tokens, spent, cached(usages))) + form.ending
    except DilaserveError as error:
        yield written(form, form.failed(error))
    except Exception:
        log.exception("request %s failed", request.id)
        yield written(form, form.failed(internal(request.id)))


def internal(id: str) -> DilaserveError:
    """What clients hear of an error that is ours."""
    return DilaserveError(f"internal error; the log has more under request id {id}", code="internal")


def written(form: AnswerFormat, events: Iterable[Json]) -> bytes:
    return b"".join(event(one, one["type"] if form.named else None) for one in events)


def event(data: Json, name: str | None = None) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + _json.encode(data) + b"\n\n"


async def merged(request: HttpRequest, streams: Sequence[AnswerStream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of all streams as they come, with the stream's index; `PING` while none comes, and when the connection
    asks whether anybody is there.
    """
    arrivals: asyncio.Queue[tuple[int, Chunk | DilaserveError | None]] = asyncio.Queue()
    ahead = asyncio.Semaphore(len(streams))  # chunks that are taken out of their streams before they are written
    request.probed(lambda: arrivals.put_nowait((0, PING)))

    async def pump(index: int, stream: AnswerStream) -> None:
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
            if isinstance(chunk, DilaserveError):
                raise chunk
            left -= chunk is None
            if chunk is not None:
                yield index, chunk
            if chunk is not None and chunk is not PING:
                ahead.release()
    finally:
        for task in pumps:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*pumps, return_exceptions=True)
