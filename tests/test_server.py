"""The server as a whole: the routes around the API, keys, metrics, clients that leave, and its shutdown."""

import asyncio
import os
import signal
import time

import aiohttp
import pytest
from http_requests import CHAT, COMPLETE, HELLO, post

from dilaserve import Config, Engine
from dilaserve.server.app import running
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_client_that_leaves_frees_its_row(client, engine):
    async with client.post(CHAT, json=HELLO | {"max_tokens": 200, "stream": True}) as response:
        await response.content.readline()
        assert engine.streams
    await asyncio.wait_for(engine.idle.wait(), 30)
    task = asyncio.create_task(post(client, CHAT, HELLO | {"max_tokens": 200}))
    while not engine.streams:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait_for(engine.idle.wait(), 30)
    assert not engine.scheduler.requests


async def test_the_other_routes_answer(client):
    async def get(path):
        async with client.get(path) as response:
            return response.status, await response.json()

    assert await get("/health") == (200, {"status": "ok"})
    assert await get("/ready") == (200, {"status": "ready"})
    assert "version" in (await get("/version"))[1]
    (card,) = (await get("/v1/models"))[1]["data"]
    assert (card["max_model_len"], card["root"].endswith("random")) == (256, True)
    _, body, _ = await post(client, "/tokenize", {"prompt": "é"})
    assert body["count"] == 2
    assert (await post(client, "/detokenize", {"tokens": body["tokens"]}))[1] == {"prompt": "é"}
    assert (await post(client, "/tokenize", {}))[0] == 400
    status, body, _ = await post(client, "/detokenize", {"tokens": [-1]})
    assert (status, body["error"]["param"]) == (400, "tokens")
    async with client.get("/v1/models/somebody/model") as response:
        assert (response.status, (await response.json())["error"]["param"]) == (404, "model")


async def test_prometheus_reads_what_happened(client):
    await post(client, CHAT, HELLO | {"slo": {"deadline_ms": 60_000}})
    async with client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(found['dilaserve_deadlines_total{fate="met"}']) >= 1
    assert float(found["dilaserve_device_seconds_total"]) > 0
    assert float(found["dilaserve_instances"]) == 1
    assert (found["dilaserve_requests_running"], found["dilaserve_requests_waiting"]) == ("0.0", "0.0")


async def test_a_key_is_asked_for_where_one_is_set(engine):
    config = Config.of(port=0, api_key="secret")
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        status, body, headers = await post(client, CHAT, HELLO)
        assert (status, body["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        for wrong in ("Bearer wrong", "Basic secret", "secret", "Bearer", "Bearer \xff"):
            assert (await post(client, CHAT, HELLO, authorization=wrong))[0] == 401
        assert (await post(client, CHAT, HELLO, authorization="bearer secret"))[0] == 200
        assert (await post(client, CHAT, HELLO, authorization="Bearer secret"))[0] == 200
        async with client.get("/health") as response:
            assert response.status == 200


async def test_a_server_that_shuts_down_says_that_it_is_draining():
    config = Config.of(port=0)
    async with (
        Engine(config, assemble=pretended(llada_8b_h200(), 1, 256)) as engine,
        running(engine, config) as address,
        aiohttp.ClientSession(address) as client,
    ):
        async with client.get("/ready") as response:
            assert (response.status, response.headers.get("connection")) == (200, None)
        await engine.drain(0.0)
        async with client.get("/ready") as response:
            message = (await response.json())["error"]["message"]
        assert (response.status, message) == (503, "the server is draining")
        status, body, headers = await post(client, COMPLETE, {"prompt": [1, 2], "stream": True})
        assert (status, body["error"]["message"]) == (503, "the server is shutting down; try another")
        for told in (response.headers, headers):
            assert int(told["retry-after"]) > 0
            assert told["connection"] == "close"  # a gateway's next request goes to another server
        async with client.get("/health") as response:
            assert (response.status, response.headers["connection"]) == (200, "close")


async def test_a_connection_that_was_kept_open_ends_while_the_server_drains(engine):
    """The bytes behind the answer are the end; before, it would have been the answer to another request."""
    async with running(engine, Config.of(port=0)) as address:
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        ask = b"GET /ready HTTP/1.1\r\nhost: here\r\n\r\n"
        try:
            writer.write(ask)
            assert b"200" in await reader.readline()
            await reader.readuntil(b'{"status":"ready"}')
            await engine.drain(30)
            writer.write(ask)
            assert b"503" in await reader.readline()
            assert b"draining" in await asyncio.wait_for(reader.read(), 60)
        finally:
            engine.draining = False
            writer.close()


async def test_a_deadline_that_passes_while_a_worker_is_stopped_is_answered_at_once(client, engine):
    """A row in flight as well: its client is told, and the row comes back when the step ends."""
    (worker,) = engine.executor.workers.values()
    soon = HELLO | {"max_tokens": 128, "slo": {"deadline_ms": 500, "on_miss": "cancel_when_late"}}
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        answers = await asyncio.gather(*(post(client, CHAT, soon) for _ in range(3)))
        took = time.monotonic() - began
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    assert [status in (429, 504) for status, _, _ in answers] == [True] * 3
    assert {body["error"]["code"] for _, body, _ in answers} == {"deadline"}
    assert took < 5.0  # 0.5 s and what a busy machine takes
    await engine.drain(30)
    engine.draining = False
    assert len(engine.consumer.free) == engine.table.rows
