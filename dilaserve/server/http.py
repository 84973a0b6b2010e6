"""HTTP apart from any server of it: what routes read, and what they give back."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

import msgspec

from dilaserve.errors import DilaserveError
from dilaserve.server.api_keys import Tenant

_json = msgspec.json.Encoder()
JSON = "application/json"
STALLED_AFTER = 60.0  # seconds that a client may refuse to read before it is cut off


class Body(Protocol):
    """What a client sends. `length`: the bytes that it has announced; iterating raises `HttpError` where it breaks."""

    length: int | None

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Events(Protocol):
    """The pieces of a stream, an async generator for one."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...

    async def aclose(self) -> None: ...


class HttpRequest:
    """One request. `path` is decoded and canonical, names of `headers` are compared without case.

    `probed` takes what is to be done when the connection asks whether the client still reads; a server that hears of
    clients that leave has no need to call it. While it is answered, the request also remembers its `id`, whose key it
    came with (`tenant`), the parts of its path that the route names (`names`), and what it was refused with.
    """

    def __init__(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: Body,
        probed: Callable[[Callable[[], None]], None] = lambda act: None,
    ) -> None:
        self.method, self.path, self.query, self.headers, self.body = method, path, query, headers, body
        self.probed = probed
        self.id = self.refusal = ""
        self.route = "unknown"  # the pattern of its path
        self.names: Mapping[str, str] = {}
        self.tenant: Tenant | None = None

    @property
    def media_type(self) -> str:
        """That of the body, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class HttpResponse:
    """An answer: its `body`, or the pieces of a stream in `events`.

    Whoever sends it closes it, whether all was sent or not; `resources` are released then. `closes`: the
    connection ends with it.
    """

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = JSON,
        events: Events | None = None,
        resources: contextlib.AsyncExitStack | None = None,
        closes: bool = False,
    ) -> None:
        self.status, self.body, self.events, self.closes = status, body, events, closes
        self.headers = {**(headers or {})}
        if media_type:
            self.headers.setdefault("content-type", media_type)
        self.resources = resources or contextlib.AsyncExitStack()

    async def aclose(self) -> None:
        async with self.resources:
            if self.events is not None:
                await self.events.aclose()


class HttpError(DilaserveError):
    """A request that HTTP itself refuses. `allow`: the methods that the path takes; `closes`: as of `HttpResponse`."""

    kind = "invalid_request_error"
    CODES: Mapping[int, str] = {
        404: "not_found",
        405: "method_not_allowed",
        408: "timeout",
        413: "body_too_large",
        415: "unsupported_type",
        417: "expectation_failed",
    }

    def __init__(self, status: int, message: str, allow: str = "", closes: bool = False) -> None:
        super().__init__(message, code=self.CODES.get(status))
        self.status, self.allow, self.closes = status, allow, closes


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> HttpResponse:
    return HttpResponse(_json.encode(body), status, headers)
