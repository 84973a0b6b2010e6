"""Cross-origin requests from browsers (the Fetch standard, CORS protocol): which pages of other sites may ask."""

from dilaserve.server.http import HttpRequest, HttpResponse

METHODS = "GET, POST, OPTIONS"
LONGEST = "600"  # seconds that a browser may remember the answer to a preflight
EXPOSED = "x-request-id, retry-after, x-should-retry"  # headers of answers that scripts may read


class Origins:
    """`allowed`: origins as browsers send them, or `*` for every site."""

    def __init__(self, allowed: str) -> None:
        self.allowed = frozenset(filter(None, (one.strip().rstrip("/") for one in allowed.split(","))))

    def allow(self, request: HttpRequest) -> str | None:
        """The origin to name in the answer; None where the request comes from no page that may read it."""
        origin = request.headers.get("origin")
        if origin is None or not self.allowed:
            return None
        if "*" in self.allowed:
            return "*"
        return origin if origin in self.allowed else None

    def preflight(self, request: HttpRequest) -> HttpResponse | None:
        """The answer to a browser that asks whether it may ask; None if this is another request. It needs no key."""
        asked = request.headers.get("access-control-request-method")
        if request.method != "OPTIONS" or asked is None or self.allow(request) is None:
            return None
        headers = {"access-control-allow-methods": METHODS, "access-control-max-age": LONGEST}
        headers["access-control-allow-headers"] = request.headers.get("access-control-request-headers", "*")
        return HttpResponse(status=204, headers=headers, media_type="")

    def mark(self, request: HttpRequest, response: HttpResponse) -> None:
        """Let the page read the answer, whatever its status; to be called before its head is sent."""
        if not self.allowed:
            return
        if origin := self.allow(request):
            response.headers["access-control-allow-origin"] = origin
            response.headers["access-control-expose-headers"] = EXPOSED
        if "*" not in self.allowed:
            known = response.headers.get("vary")
            response.headers["vary"] = f"{known}, origin" if known else "origin"
