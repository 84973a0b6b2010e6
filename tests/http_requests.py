"""Requests to a server as OpenAI's clients send them."""

import contextlib
import json

import aiohttp

from dilaserve import Config, Engine
from dilaserve.server.app import running

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
EIGHT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "ignore_eos": True}
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "block_length": 8}


@contextlib.asynccontextmanager
async def client_of(directory, **settings):
    """A client of a server of the model in this directory, on a port of its own."""
    async with (
        Engine(Config.of(model=str(directory), devices="cpu", port=0, **settings)) as engine,
        running(engine, engine.config) as address,
        aiohttp.ClientSession(address) as client,
    ):
        yield client


async def post(client, path, body, **headers):
    async with client.post(path, json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers


async def stream(client, path, body):
    """The raw event stream and its data objects."""
    async with client.post(path, json=body | {"stream": True}) as response:
        raw = (await response.read()).decode()
    assert response.status == 200, raw
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    lines = raw.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
