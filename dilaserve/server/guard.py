"""Around every request: its id, its key, and OpenAI's error shape for whatever goes wrong."""

import asyncio
import hmac
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from dilaserve.errors import (
    BadRequest,
    DilaserveError,
    Forbidden,
    Unauthorized,
    shortened,
)
from dilaserve.server import messages_api, sse
from dilaserve.server.app_keys import CONFIG, KEYS, ORIGINS, TENANT
from dilaserve.server.responses import Json, failure
from dilaserve.system import logs

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Seen = Callable[[str, str, int, float], None]
CLIENT_LEFT = 499  # as nginx has it, for logs and metrics only
METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}
LINE = "%.20s %.200r answered with %d after %.3f s%s"
REFUSAL: web.RequestKey[str] = web.RequestKey("refusal", str)  # what the client was told
PLAN = "/v1/plan"
OPEN = {"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"}  # no key needed
FILES = "/static/"  # nor for what the page loads
STATUSES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 408: "timeout", 415: "unsupported_type"}
STATUSES[417] = "expectation_failed"
_json = msgspec.json.Encoder()


def answered(handle: Handler, seen: Seen) -> Handler:
    """What answers every request, inside aiohttp's routing and outside: the answer has an id and OpenAI's shape.

    `seen` hears of each: its route, method, status and seconds.
    """

    async def identified(request: web.Request) -> web.StreamResponse:
        given = request.headers.get("x-request-id", "")
        id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else secrets.token_hex(12)
        request[sse.REQUEST_ID] = id
        logs.REQUEST.set(id)
        began, status = time.perf_counter(), CLIENT_LEFT
        try:
            response = await handle(request)
            status = response.status
        except web.HTTPException as error:  # an expectation that is refused before any route
            response = respelled(error, request)
            status = response.status
        finally:
            seconds = time.perf_counter() - began
            seen(route(request), request.method if request.method in METHODS else "other", status, seconds)
            level, said = logging.INFO if status >= 400 else logging.DEBUG, request.get(REFUSAL, "")
            log.log(level, LINE, request.method, request.path, status, seconds, said and f": {said}")
        if not response.prepared:
            response.headers["x-request-id"] = id
        return response

    return identified


def route(request: web.Request) -> str:
    """The pattern of its path; few, whatever clients ask for."""
    resource = getattr(getattr(request.match_info, "route", None), "resource", None)
    return resource.canonical if resource else "unknown"


@web.middleware
async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check the request's key, and turn whatever goes wrong into OpenAI's error shape."""
    id = request[sse.REQUEST_ID]
    try:
        if preflight := request.app[ORIGINS].preflight(request):
            return preflight
        authorize(request)
        response = await handler(request)
    except DilaserveError as error:
        response = refused(error, request)
    except web.HTTPException as error:
        response = respelled(error, request)
    except (ConnectionResetError, asyncio.CancelledError):
        log.info("request %s: the client left", id)
        raise
    except Exception:
        log.exception("request %s failed", id)
        response = refused(
            DilaserveError(f"internal error; the log has more under request id {id}", code="internal"), request
        )
    return response


def authorize(request: web.Request) -> None:
    """Check the key, and remember whose it is."""
    server, keys = request.app[CONFIG].server, request.app[KEYS]
    if request.path in OPEN or request.path.startswith(FILES):
        return
    sent = sent_key(request)
    owner = keys.owner(sent) if sent is not None else None
    if owner:
        request[TENANT] = owner
    admin = is_key(sent, server.admin_key) or (owner is not None and owner.admin)
    known = admin or owner is not None or is_key(sent, server.api_key)
    if request.path == PLAN and request.method == "POST":
        if server.admin_key is None and not any(one.admin for one in keys.tenants):
            raise Forbidden("the plan cannot be changed here; start the server with --admin-key")
        if admin:
            return
        if known:
            raise Forbidden("this key may not change the plan; send the admin key")
        raise Unauthorized("the admin key is missing or wrong; send it as `Authorization: Bearer KEY`")
    if not known and (server.api_key is not None or keys.tenants):
        raise Unauthorized("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")


def sent_key(request: web.Request) -> str | None:
    """The key that came with the request, as OpenAI's clients send it, or else as Anthropic's do."""
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    return sent.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")


def is_key(sent: str | None, key: str | None) -> bool:
    """Whether this is the key, in a time that does not depend on how much of it is right."""
    if sent is None or key is None:
        return False
    return hmac.compare_digest(sent.encode(errors="replace"), key.encode())


def refused(error: DilaserveError, request: web.Request) -> web.Response:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.never_feasible:
        headers["x-should-retry"] = "false"  # OpenAI's clients heed it
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(shaped(error, request), error.status, headers)


def shaped(error: DilaserveError, request: web.Request) -> Json:
    """The error in the shape that clients of this path read; the log will have its sentence."""
    request[REFUSAL] = error.message
    if request.path.startswith(messages_api.MESSAGES):
        return messages_api.failure(error, request[sse.REQUEST_ID])
    return failure(error)


def respelled(error: web.HTTPException, request: web.Request) -> web.Response:
    """aiohttp's own refusals (404, 405, 413 …) in OpenAI's shape."""
    reasons = {
        404: f"there is no {shortened(f'{request.method} {request.path}')}",
        405: f"{shortened(request.path)} does not take {shortened(request.method)}",
        417: "the only expectation that is met is 100-continue; leave out the header Expect",
        413: f"the body exceeds {request.app[CONFIG].server.max_body_bytes} bytes (--max-body-bytes)",
    }
    ours = BadRequest(
        reasons.get(error.status) or shortened(error.text or error.reason), code=STATUSES.get(error.status)
    )
    headers = {"allow": error.headers["allow"]} if "allow" in error.headers else {}
    ours.status = error.status
    response = json_response(shaped(ours, request), error.status, headers)
    if error.status == 400:  # the body is broken, and with it what would come behind it
        response.force_close()
    return response


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_json.encode(body), status=status, headers=headers, content_type="application/json")
