"""An OpenAI endpoint as a client sees it: its address, its key, the chunks of a stream and what they say."""

import json
import os
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp

from dilaserve.errors import ConfigError

CHAT = "/v1/chat/completions"
LINE = 2**22  # bytes of the longest event read
LISTED = 15.0  # seconds for a server to say what it serves
START = "start one with `dilaserve` in another terminal, or give the address of one that runs"
Json = dict[str, Any]


class Slot(NamedTuple):
    """A position of the block that is being decoded: its text, None while masked, and its confidence, 0 to 1."""

    text: str | None
    confidence: float


def root_of(url: str) -> str:
    """The address without a slash and /v1 at its end. Raises `ConfigError` for what is no address."""
    url = url if "://" in url else f"http://{url}"
    if not url.startswith(("http://", "https://")) or not url.split("://")[1].strip("/"):
        raise ConfigError(f"{url!r} is no address of a server; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def opened(key: str | None, timeout: float | None = None) -> aiohttp.ClientSession:
    """A session with the key of --api-key or OPENAI_API_KEY; `timeout` seconds for a request, or none."""
    key = key or os.environ.get("OPENAI_API_KEY")
    return aiohttp.ClientSession(
        headers={"authorization": f"Bearer {key}"} if key else {},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=10),
        read_bufsize=LINE,
    )


async def first_model(session: aiohttp.ClientSession, url: str) -> Json:
    """The first entry of /v1/models. Raises `ConfigError` with a cure where nothing answers as it should."""
    try:
        async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=LISTED)) as response:
            body = await response.text()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConfigError(f"no server answers at {url}; {START}") from error
    if response.status != 200:
        raise ConfigError(f"{url}/v1/models gives {response.status}: {reason(body)}")
    try:
        return dict(json.loads(body)["data"][0])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{url}/v1/models does not list models as OpenAI's does") from error


async def chunks(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """The JSON of each event of a stream, up to [DONE]. Raises `ValueError` for an event that is none."""
    async for line in response.content:
        text = line.decode(errors="replace").strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data:"):
            yield json.loads(text.removeprefix("data:"))


def spoken(chunk: Json) -> str:
    """The text that a chunk of a chat adds."""
    choices = chunk.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def canvas_of(chunk: Json) -> list[Slot]:
    """The open block that a chunk shows (`stream_options.include_canvas`); empty where it shows none."""
    canvas = (chunk.get("dilaserve") or {}).get("canvas")
    if not isinstance(canvas, dict):
        return []
    texts, sure = canvas.get("tokens") or [], canvas.get("confidences") or []
    return [
        Slot(None if text is None else str(text), float((sure[i] if i < len(sure) else None) or 0.0))
        for i, text in enumerate(texts)
    ]


def reason(body: str) -> str:
    """The sentence in an error's body."""
    try:
        found = json.loads(body)["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, TypeError):
        return body[:300] or "no reason given"
