"""The path of a request as routes know it: without the prefix of a proxy, doubled slashes and a slash at the end."""

import re
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from yarl import URL

SLASHES = re.compile("/{2,}")
MakeRequest = Callable[..., web.BaseRequest]


def rooted(make: MakeRequest, root_path: str) -> MakeRequest:
    """What makes a request of a message, given the message with its canonical path."""
    root = f"/{root_path.strip('/')}" if root_path.strip("/") else ""

    def made(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
        return make(at_canonical_path(message, root), *rest)

    return made


def at_canonical_path(message: RawRequestMessage, root: str) -> RawRequestMessage:
    path = canonical(message.url.raw_path, root)
    if path == message.url.raw_path:
        return message
    url = URL.build(path=path, query_string=message.url.raw_query_string, encoded=True)
    return message._replace(path=str(url), url=url)


def canonical(path: str, root: str) -> str:
    """Proxies may strip the prefix `root` or leave it."""
    if not path.startswith("/"):
        return path
    path = SLASHES.sub("/", path)
    if root and (path == root or path.startswith(f"{root}/")):
        path = path.removeprefix(root)
    return path.rstrip("/") or "/"
