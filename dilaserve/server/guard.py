"""Who may ask for what, and OpenAI's error shape for whatever goes wrong."""

import hmac
import math

from dilaserve.errors import DilaserveError, Forbidden, Unauthorized
from dilaserve.server import messages_api
from dilaserve.server.http import HttpError, HttpRequest, HttpResponse, json_response
from dilaserve.server.responses import Json, failure
from dilaserve.server.service import Service

PLAN = "/v1/plan"
OPEN = {"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"}  # no key needed
ELSEWHERE = 5.0  # seconds after which it makes sense to ask again where nothing is taken for a reason unknown
FILES = "/static/"  # nor for what the page loads


def authorize(service: Service, request: HttpRequest) -> None:
    """Check the key, and remember whose it is."""
    server, keys = service.config.server, service.keys
    if request.path in OPEN or request.path.startswith(FILES):
        return
    sent = sent_key(request)
    owner = keys.owner(sent) if sent is not None else None
    if owner:
        request.tenant = owner
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


def sent_key(request: HttpRequest) -> str | None:
    """The key that came with the request, as OpenAI's clients send it, or else as Anthropic's do."""
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    return sent.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")


def is_key(sent: str | None, key: str | None) -> bool:
    """Whether this is the key, in a time that does not depend on how much of it is right."""
    if sent is None or key is None:
        return False
    return hmac.compare_digest(sent.encode(errors="replace"), key.encode())


def refused(error: DilaserveError, request: HttpRequest) -> HttpResponse:
    headers = {}
    retry_after = ELSEWHERE if error.status == 503 and error.retry_after is None else error.retry_after
    if retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    if error.never_feasible:
        headers["x-should-retry"] = "false"  # OpenAI's clients heed it
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, HttpError) and error.allow:
        headers["allow"] = error.allow
    response = json_response(shaped(error, request), error.status, headers)
    response.closes = isinstance(error, HttpError) and error.closes
    return response


def shaped(error: DilaserveError, request: HttpRequest) -> Json:
    """The error in the shape that clients of this path read; the log will have its sentence."""
    request.refusal = error.message
    if request.path.startswith(messages_api.MESSAGES):
        return messages_api.failure(error, request.id)
    return failure(error)
