"""The few pages of Hugging Face's hub that a download of a model asks for, served from directories on 127.0.0.1."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"  # the one commit of every model


class Hub(http.server.ThreadingHTTPServer):
    """`models` are directories by name; `gated` ones are listed, not handed out; `asked` are paths of requests."""

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = (), token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.models, self.gated, self.token = models, gated, token
        self.asked: list[str] = []
        self.released = (
            threading.Event()
        )  # what requests for `org/silent` wait for, and those for the files of `org/stalled`

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Page(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        parts = parts[2:] if listing else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "org/silent" or (name == "org/stalled" and rest[:1] == ["tree"]):
            self.server.released.wait(60)
            self.close_connection = True
        elif name not in self.server.models:
            self.refuse(401 if self.server.token is None else 404, "RepoNotFound")
        elif len(rest) > 1 and rest[1] not in ("main", "v1", SHA):
            self.refuse(404, "RevisionNotFound")
        elif listing:
            self.reply(json.dumps(self.tree(name) if rest[:1] == ["tree"] else self.about(name)).encode(), body)
        elif name in self.server.gated and self.headers.get("authorization") != f"Bearer {self.server.token}":
            self.refuse(403, "GatedRepo")
        elif (file := self.server.models[name].joinpath(*rest[2:])).is_file():
            self.reply(file.read_bytes(), body)
        else:
            self.refuse(404, "EntryNotFound")

    def files(self, name: str) -> Iterator[Path]:
        return (file for file in sorted(self.server.models[name].rglob("*")) if file.is_file())

    def about(self, name: str) -> dict[str, object]:
        names = [str(file.relative_to(self.server.models[name])) for file in self.files(name)]
        return {"_id": "1", "id": name, "sha": SHA, "siblings": [{"rfilename": one} for one in names], "tags": []}

    def tree(self, name: str) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": str(file.relative_to(self.server.models[name])),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in self.files(name)
        ]

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        for header in (("X-Error-Code", code), ("X-Error-Message", code), ("Content-Length", "0")):
            self.send_header(*header)
        self.end_headers()

    def reply(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        for header in (("X-Repo-Commit", SHA), ("ETag", etag), ("Content-Length", str(len(data)))):
            self.send_header(*header)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        """Nobody reads it."""


@contextlib.contextmanager
def serving(models: dict[str, Path], **more) -> Iterator[Hub]:
    with Hub(models, **more) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            hub.shutdown()
            thread.join()
