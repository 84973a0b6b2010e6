"""A client of an ASGI application, without a server between them."""

import asyncio
import json
from urllib.parse import quote, urlsplit


class Answer:
    def __init__(self):
        self.status, self.headers, self.body = None, {}, b""

    def json(self):
        return json.loads(self.body)


class Exchange:
    """One request. `leave` closes the connection, after so many pieces of the answer if `after` says so."""

    def __init__(self, app, method, url, body=b"", headers=(), pieces=1, after=None):
        self.app, self.answer, self.after, self.came = app, Answer(), after, 0
        self.gone, self.piece = asyncio.Event(), asyncio.Event()
        parts = urlsplit(url)
        sent = {"content-type": "application/json", **dict(headers)} if body else dict(headers)
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": parts.path,
            "raw_path": quote(parts.path, safe="/%").encode(),
            "query_string": parts.query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        }
        size = -(-len(body) // pieces) or 1
        parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        self.messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        self.messages[-1]["more_body"] = False

    async def receive(self):
        if self.messages and not self.gone.is_set():
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            assert self.answer.status is None
            self.answer.status = message["status"]
            self.answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        assert self.answer.status is not None
        self.answer.body += message.get("body", b"")
        self.came += 1
        if self.came == self.after:
            self.leave()

    def leave(self):
        self.gone.set()

    async def run(self):
        await self.app(self.scope, self.receive, self.send)
        return self.answer


async def ask(app, method, url, body=None, pieces=1, **headers):
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return await Exchange(app, method, url, data, headers.items(), pieces).run()
