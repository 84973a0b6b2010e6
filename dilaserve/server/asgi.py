"""The service as an ASGI application (asgi.readthedocs.io, HTTP of version 3), for servers other than aiohttp."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

from multidict import CIMultiDict, MultiDict

from dilaserve.server import edge, paths
from dilaserve.server.http import STALLED_AFTER, HttpRequest, HttpResponse
from dilaserve.server.service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AsgiApp:
    """Answers `http` connections and takes part in the `lifespan` of its server.

    `names_requests`: answers carry `x-request-id`; not where the server before it adds that.
    """

    def __init__(self, service: Service, names_requests: bool = True) -> None:
        self.service, self.names_requests = service, names_requests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["type"] == "http":
            await self.respond(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.service.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def respond(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, until that is done or the client has left."""
        headers = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        length = headers.get("content-length", "")
        body = Body(receive, int(length) if length.isdecimal() else None)
        request = translated(scope, headers, body, paths.root_of(self.service.config.server.root_path))
        answering = asyncio.ensure_future(self.answer(request, send))
        leaving = asyncio.ensure_future(body.left())
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled():
            answering.result()

    async def answer(self, request: HttpRequest, send: Send) -> None:
        response = await edge.answer(self.service, request)
        if not self.names_requests:
            del response.headers["x-request-id"]
        async with contextlib.aclosing(response):
            await send(head(response))
            if response.events is None:
                await send({"type": "http.response.body", "body": b"" if request.method == "HEAD" else response.body})
                return
            async for data in response.events:
                async with asyncio.timeout(STALLED_AFTER):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body"})


class Body:
    """What the client sends, as it comes; and, once that is whole, when it leaves."""

    def __init__(self, receive: Receive, length: int | None) -> None:
        self.receive, self.length = receive, length
        self.whole = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self.whole.is_set():
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left before its request was whole")
            if piece := message.get("body", b""):
                yield piece
            if not message.get("more_body", False):
                self.whole.set()

    async def left(self) -> None:
        """Wait until the client leaves. A request whose body nobody reads is answered too soon for that to matter."""
        await self.whole.wait()
        while (await self.receive())["type"] != "http.disconnect":
            continue


def translated(scope: Message, headers: Mapping[str, str], body: Body, root: str) -> HttpRequest:
    query = MultiDict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
    raw = scope.get("raw_path")
    path = paths.canonical(scope["path"], root) if raw is None else paths.decoded(raw.decode("latin-1"), root)
    return HttpRequest(scope["method"], path, query, headers, body)


def head(response: HttpResponse) -> Message:
    headers = dict(response.headers)
    if response.events is None and response.status not in (204, 304):
        headers["content-length"] = str(len(response.body))
    if response.closes:
        headers["connection"] = "close"
    listed = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": response.status, "headers": listed}
