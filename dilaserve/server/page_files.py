"""The page at `/` and the files that it loads: those of this package, and the chart library's from its own package."""

import asyncio
import base64
import gzip
import hashlib
import html
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dilaserve.errors import shortened
from dilaserve.server.http import HttpError, HttpRequest, HttpResponse

FOLDER = Path(__file__).parent / "page"
CHARTS = "plotly.min.js"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
BASE = '<base href="/" />'  # in the page, replaced by the prefix under which a proxy serves it
INLINE_STYLE = re.compile(rb"\.textContent='(\.maplibregl[^'\\]*)'")  # a style sheet that plotly.js adds for its maps
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and answered with 304 while it is the same
}


class File(NamedTuple):
    """A file as it is sent."""

    body: bytes
    kind: str
    etag: str


class Loaded(NamedTuple):
    """All files, and the policy that lets the page load them and nothing else."""

    files: Mapping[str, File]
    policy: str


class Page:
    """The files by name, read when the first of them is asked for. `root_path`: the prefix of a proxy."""

    def __init__(self, root_path: str) -> None:
        self.root_path = root_path
        self.lock = asyncio.Lock()
        self.loaded: Loaded | None = None
        self.zipped: dict[str, bytes] = {}  # of those that have been sent

    async def answer(self, request: HttpRequest, name: str) -> HttpResponse:
        """The file of this name. Raises `HttpError`."""
        files, policy = await self.load()
        if (file := files.get(name)) is None:
            raise HttpError(404, f"there is no {request.method} {shortened(request.path)}")
        headers = {**HEADERS, "etag": file.etag, "content-security-policy": policy, "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == file.etag:
            return HttpResponse(status=304, headers=headers, media_type="")
        body = file.body
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["content-encoding"] = await self.compressed(name, file.body), "gzip"
        return HttpResponse(body, headers=headers, media_type=f"{file.kind}; charset=utf-8")

    async def load(self) -> Loaded:
        """Read them once, beside the event loop."""
        async with self.lock:
            if self.loaded is None:
                self.loaded = await asyncio.to_thread(loaded, self.root_path)
        return self.loaded

    async def compressed(self, name: str, body: bytes) -> bytes:
        """The file as gzip, compressed beside the event loop when it is first asked for."""
        if name not in self.zipped:
            self.zipped[name] = await asyncio.to_thread(gzip.compress, body, 6, mtime=0)
        return self.zipped[name]


def loaded(root_path: str) -> Loaded:
    bodies = dict(read(root_path))
    inline = [one.group(1) for one in INLINE_STYLE.finditer(bodies.get(CHARTS, b""))]
    return Loaded({name: described(name, body) for name, body in bodies.items()}, policy(inline))


def read(root_path: str) -> Iterator[tuple[str, bytes]]:
    root = f"/{root_path.strip('/')}/" if root_path.strip("/") else "/"
    for path in FOLDER.iterdir():
        if path.suffix in TYPES:
            body = path.read_bytes()
            if path.suffix == ".html":
                body = body.replace(BASE.encode(), BASE.replace('"/"', f'"{html.escape(root)}"').encode())
            yield path.name, body
    if charts := chart_library():
        yield CHARTS, charts.read_bytes()


def chart_library() -> Path | None:
    """Where the installed plotly keeps its JavaScript; None if it does not. Nothing of it is imported."""
    spec = importlib.util.find_spec("plotly")
    folders = spec.submodule_search_locations if spec else None
    found = (Path(folder) / "package_data" / CHARTS for folder in folders or ())
    return next((path for path in found if path.is_file()), None)


def described(name: str, body: bytes) -> File:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return File(body, TYPES[Path(name).suffix], etag)


def policy(inline_styles: list[bytes]) -> str:
    """The content security policy: no inline code, and of inline styles those given, by their hash."""
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(style).digest()).decode()}'" for style in inline_styles]
    return "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            " ".join(["style-src 'self'", *hashes]),
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def wants_page(request: HttpRequest) -> bool:
    """Whether the client takes HTML as soon as JSON."""
    accepted = request.headers.get("accept", "*/*").lower()
    return "json" not in accepted or "html" in accepted
