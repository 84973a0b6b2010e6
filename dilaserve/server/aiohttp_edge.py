"""The service over aiohttp: its requests and answers as those of the service."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from dilaserve.server import edge, paths
from dilaserve.server.connection import INTERIM, Connection
from dilaserve.server.http import STALLED_AFTER, HttpError, HttpRequest, HttpResponse
from dilaserve.server.service import Service


def server(service: Service) -> web.Server:
    """What answers the requests of connections; a client that leaves cancels its request."""
    root = paths.root_of(service.config.server.root_path)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await encourage(request)
        answer = await edge.answer(service, translated(request, root))
        async with contextlib.aclosing(answer):
            return whole(answer) if answer.events is None else await streamed(request, answer)

    return web.Server(handle, handler_cancellation=True)


async def encourage(request: web.BaseRequest) -> None:
    """Tell a client that waits for it to send its body."""
    if request.headers.get("expect", "").lower() == "100-continue" and request.transport:
        request.transport.write(INTERIM)


def translated(request: web.BaseRequest, root: str) -> HttpRequest:
    connection = request.protocol
    path = paths.decoded(request.rel_url.raw_path, root)
    probed = connection.on_probe if isinstance(connection, Connection) else ignore
    return HttpRequest(request.method, path, request.query, request.headers, Body(request), probed)


def ignore(act: Callable[[], None]) -> None:
    """Of connections that find clients that have left by themselves."""


class Body:
    """What the client sends, as it comes."""

    def __init__(self, request: web.BaseRequest) -> None:
        self.content, self.length = request.content, request.content_length

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self.content.iter_any():
                yield piece
        except web.RequestPayloadError as error:
            self.content.feed_eof()  # aiohttp would read on, and fail again
            reason = " ".join(str(error).split())
            raise HttpError(400, f"the body cannot be read: {reason}", closes=True) from error


def whole(answer: HttpResponse) -> web.Response:
    response = web.Response(body=answer.body, status=answer.status, headers=answer.headers)
    if answer.closes:
        response.force_close()
    return response


async def streamed(request: web.BaseRequest, answer: HttpResponse) -> web.StreamResponse:
    """Write what comes as it comes; a client that stops reading is cut off."""
    assert answer.events
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    if answer.closes:
        response.force_close()
    await response.prepare(request)
    async for data in answer.events:
        if not data:
            continue
        try:
            async with asyncio.timeout(STALLED_AFTER):
                await response.write(data)
        except TimeoutError:
            if request.transport:
                request.transport.abort()
            break
    return response
