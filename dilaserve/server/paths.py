"""The path of a request as routes know it: without the prefix of a proxy, doubled slashes and a slash at the end."""

import re
from urllib.parse import unquote

SLASHES = re.compile("/{2,}")


def root_of(prefix: str) -> str:
    """The prefix of a proxy as paths begin with it; nothing for none."""
    return f"/{prefix.strip('/')}" if prefix.strip("/") else ""


def canonical(path: str, root: str) -> str:
    """A path as it came. Proxies may strip the prefix `root` or leave it."""
    if not path.startswith("/"):
        return path
    path = SLASHES.sub("/", path)
    if root and (path == root or path.startswith(f"{root}/")):
        path = path.removeprefix(root)
    return path.rstrip("/") or "/"


def decoded(path: str, root: str) -> str:
    """The same with its percent encoding undone, as routes are compared with it."""
    return unquote(canonical(path, root), errors="replace")
