"""A connection as aiohttp keeps it, except where that does not suit: what it says when no handler can (in OpenAI's
shape, without traceback), and clients that shut their writing side after a whole request.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.http_parser import RawRequestMessage

from dilaserve.errors import BadRequest, shortened
from dilaserve.server.feeder import Feeder
from dilaserve.server.responses import failure

log = logging.getLogger(__name__)
PROBE_AFTER = 1.0  # seconds between questions whether a client that sends no more still reads
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"  # every client of HTTP/1.1 skips it


class Connection(web.RequestHandler):
    """The end of what a client sends may mean that it has left, or only that it has sent all.

    With a whole request unanswered it counts as the latter, and the answer is the last thing on the connection. A
    client that has left is found by writing: `probe` sends something that does not matter, at which the other side
    says that nobody is there.
    """

    __slots__ = ("asked", "ended", "feeder", "half_closed", "pending", "probe", "timer")

    def __init__(self, manager: web.Server, feeder: Feeder, **named: Any) -> None:
        super().__init__(manager, **named)
        self.feeder = feeder
        self.pending = bytearray()  # received, and not parsed yet
        self.ended = False  # the client's end has come behind what is pending
        self.asked: StreamReader | None = None  # the body of the last request that was taken up
        self.half_closed = False
        self.probe: Callable[[], None] = self.send_interim
        self.timer: asyncio.TimerHandle | None = None
        self._request_factory = self.remembering(self._request_factory)

    def remembering(self, make: Any) -> Any:
        """Makes requests, and knows the last one before anything else happens to it."""

        def made(message: RawRequestMessage, body: StreamReader, *rest: Any) -> web.BaseRequest:
            self.taken_up(body)
            request: web.BaseRequest = make(message, body, *rest)
            return request

        return made

    # what comes in

    def data_received(self, data: bytes) -> None:
        if not data:  # aiohttp goes on with what it holds
            self.parse(data)
            return
        self.feeder.feed(self, data)
        if self.pending:
            self._pause_transport_reading()

    def parse(self, data: bytes) -> None:
        super().data_received(data)

    def drained(self) -> None:
        """Nothing is pending any more."""
        if not self._reading_paused and not self._buffer_paused:
            self._resume_transport_reading()
        if self.ended and not self.eof_received() and self.transport is not None:
            self.transport.close()

    # the end of what comes in

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the connection open for writing."""
        if self.pending:
            self.ended = True
            return True
        if not self.owes_answer():
            return False
        if not self.half_closed:
            self.half_closed = True
            self.close_after_last()
            self.timer = self._loop.call_later(PROBE_AFTER, self.is_anybody_there)
        return True

    def owes_answer(self) -> bool:
        """A request has come to its end, and its answer has not."""
        idle = self._waiter is not None and not self._waiter.done()
        if idle or self._force_close:
            return False
        body = self._messages[-1][1] if self._messages else self.asked
        return body is not None and body.is_eof()

    def taken_up(self, body: StreamReader) -> None:
        """The next request is answered now."""
        self.asked, self.probe = body, self.send_interim
        self.close_after_last()

    def on_probe(self, act: Callable[[], None]) -> None:
        """What to do from now on, until the next request, when somebody asks whether the client still reads."""
        self.probe = act

    def close_after_last(self) -> None:
        if self.half_closed and not self._messages:
            self.close()

    def is_anybody_there(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        self.probe()
        self.timer = self._loop.call_later(PROBE_AFTER, self.is_anybody_there)

    def send_interim(self) -> None:
        request = self._current_request
        if request and self.transport and request.version >= HttpVersion11 and not request.writer.output_size:
            self.transport.write(INTERIM)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.timer:
            self.timer.cancel()
        self.probe = self.send_interim
        self.force_close()  # what is pending is dropped when it is parsed
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # nobody is there to be answered
        if status != 400:
            return super().handle_error(request, status, exc, message)
        id, reason = secrets.token_hex(12), " ".join((message or "").split()).rstrip(" ^")
        reason = shortened(reason)
        log.info("request %s cannot be read: %s", id, reason)
        response = web.Response(
            body=msgspec.json.encode(failure(BadRequest(f"the request cannot be read: {reason}"))),
            status=status,
            headers={"x-request-id": id},
            content_type="application/json",
        )
        response.force_close()
        return response
