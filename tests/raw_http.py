"""Bytes of HTTP to a server and back, without a client library."""

import asyncio
import json

import pytest_asyncio

from dilaserve.server import connection
from dilaserve.server.app import running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(engine):
    async with running(engine, engine.config) as address:
        yield address.removeprefix("http://").split(":")


COMPLETE = "/v1/completions"
HELLO = {"prompt": "hello", "max_tokens": 8}
LONG = {"prompt": "hello", "max_tokens": 240, "block_length": 1}


def written(path, body, *lines, method="POST"):
    data = json.dumps(body).encode() if body is not None else b""
    head = [f"{method} {path} HTTP/1.1", "host: here", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*head, *lines, "", ""]).encode() + data


async def answered(address, sent, half=False):
    """All that comes back for these bytes, after which the writing side is shut, or a `connection: close` was sent."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    if half:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()


def final(answer):
    """Status and body of an answer, after any that say to go on."""
    while answer.startswith(connection.INTERIM):  # one for each second that the answer takes
        answer = answer.removeprefix(connection.INTERIM)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body
