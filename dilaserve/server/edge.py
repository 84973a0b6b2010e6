"""A request from its first byte to the end of its answer: its id, its route, its key, its errors, its line in the log.

All servers of HTTP call `answer`; none has a route of its own.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Self

from dilaserve.errors import DilaserveError, shortened
from dilaserve.server import sse
from dilaserve.server.guard import authorize, refused
from dilaserve.server.http import Events, HttpError, HttpRequest, HttpResponse
from dilaserve.server.routes import ROUTES, Handler
from dilaserve.server.service import Service
from dilaserve.system import logs

log = logging.getLogger(__name__)
CLIENT_LEFT = 499  # as nginx has it, for logs and metrics only
METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}
LINE = "%.20s %.200r answered with %d after %.3f s%s"
GIVEN = re.compile(r"[\x21-\x7e]{1,128}")  # an id that a client may choose


async def answer(service: Service, request: HttpRequest) -> HttpResponse:
    """The answer to a request, errors included; whoever sends it closes it. Cancelling means that the client left."""
    given = request.headers.get("x-request-id", "")
    request.id = given if GIVEN.fullmatch(given) else secrets.token_hex(12)
    logs.REQUEST.set(request.id)
    watch = Watch(service, request)
    try:
        response = await guarded(service, request)
    except BaseException:
        watch.left()
        raise
    response.headers["x-request-id"] = request.id
    response.closes |= service.backend.draining  # so that a gateway's next request goes to another server
    service.origins.mark(request, response)
    watch.begun(response)
    return response


class Watch:
    """Tells the log and the metrics how a request has ended, once."""

    def __init__(self, service: Service, request: HttpRequest) -> None:
        self.service, self.request, self.began = service, request, time.perf_counter()

    def begun(self, response: HttpResponse) -> None:
        """A whole answer is as good as sent; a stream has ended when all its events have been asked for."""
        if response.events is None:
            self.ended(response.status)
            return
        response.events = watched = Watched(response.events)
        response.resources.callback(lambda: self.ended(response.status) if watched.whole else self.left())

    def left(self) -> None:
        log.info("request %s: the client left", self.request.id)
        self.ended(CLIENT_LEFT)

    def ended(self, status: int) -> None:
        request, seconds = self.request, time.perf_counter() - self.began
        method = request.method if request.method in METHODS else "other"
        self.service.backend.answered(request.route, method, status, seconds)
        level, said = logging.INFO if status >= 400 else logging.DEBUG, request.refusal
        log.log(level, LINE, request.method, request.path, status, seconds, said and f": {said}")


class Watched:
    """Events, and whether the last of them has been asked for."""

    def __init__(self, events: Events) -> None:
        self.events, self.whole = events, False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self.events.__anext__()
        except StopAsyncIteration:
            self.whole = True
            raise

    async def aclose(self) -> None:
        await self.events.aclose()


async def guarded(service: Service, request: HttpRequest) -> HttpResponse:
    """Find the route, check the key, and turn whatever goes wrong into OpenAI's error shape."""
    try:
        found = handler(request)
        if request.headers.get("expect", "100-continue").lower() != "100-continue":
            raise HttpError(417, "the only expectation that is met is 100-continue; leave out the header Expect")
        if preflight := service.origins.preflight(request):
            return preflight
        authorize(service, request)
        if isinstance(found, HttpError):
            raise found
        return await found(service, request)
    except DilaserveError as error:
        return refused(error, request)
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("request %s failed", request.id)
        return refused(sse.internal(request.id), request)


def handler(request: HttpRequest) -> Handler | HttpError:
    """What answers it, with the route and the names in its path noted in the request."""
    methods: dict[str, Handler] = {}
    for method, pattern, found in ROUTES:
        names = matched(pattern, request.path)
        if names is not None:
            methods[method] = found
            request.route, request.names = pattern, names
    if not methods:
        return HttpError(404, f"there is no {shortened(f'{request.method} {request.path}')}")
    if "GET" in methods:
        methods["HEAD"] = methods["GET"]
    if request.method not in methods:
        said = f"{shortened(request.path)} does not take {shortened(request.method)}"
        return HttpError(405, said, allow=",".join(sorted(methods)))
    return methods[request.method]


def matched(pattern: str, path: str) -> Mapping[str, str] | None:
    """The names in a path of this pattern; None for another path. A model's name may have slashes."""
    head, brace, name = pattern.partition("{")
    if not brace:
        return {} if path == pattern else None
    rest = path.removeprefix(head)
    if rest == path or not rest or ("/" in rest and name != "model}"):
        return None
    return {name.removesuffix("}"): rest}
