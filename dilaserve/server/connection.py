"""A connection as aiohttp keeps it, but for what it says when no handler can: in OpenAI's shape, without traceback."""

import logging
import secrets

import msgspec
from aiohttp import web

from dilaserve.errors import BadRequest, shortened
from dilaserve.server.answers import failure

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    __slots__ = ()

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
