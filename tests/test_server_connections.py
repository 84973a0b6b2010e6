"""Addresses that a server listens on, paths, and connections that end early."""

import asyncio
import json
import re
import socket

import pytest
import pytest_asyncio
from aiohttp import web
from raw_http import COMPLETE, HELLO, LONG, answered, final, written

from dilaserve import Config, Engine
from dilaserve.errors import ConfigError
from dilaserve.server import connection, listening
from dilaserve.server.app import running
from dilaserve.server.paths import canonical

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(engine):
    async with running(engine, engine.config) as address:
        yield address.removeprefix("http://").split(":")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    config = Config.of(model=str(random_model), devices="cpu", port=0, root_path="llm/", max_choices=4)
    async with Engine(config) as engine:
        yield engine


async def test_a_request_that_needs_no_room_is_answered_while_bodies_wait(address):
    waiting = written(COMPLETE, HELLO)[:-5]
    writers = [(await asyncio.open_connection(*address))[1] for _ in range(20)]
    for writer in writers:
        writer.write(waiting)
    assert final(await answered(address, written("/health", None, "connection: close", method="GET")))[0] == 200
    for writer in writers:
        writer.close()


@pytest.mark.parametrize(
    ("path", "root", "found"),
    [
        ("/v1/models", "", "/v1/models"),
        ("//v1///models//", "", "/v1/models"),
        ("/", "", "/"),
        ("/llm/v1/models", "/llm", "/v1/models"),
        ("/v1/models", "/llm", "/v1/models"),
        ("//llm//v1/models/", "/llm", "/v1/models"),
        ("/llm", "/llm", "/"),
        ("/llmore/v1", "/llm", "/llmore/v1"),
        ("/v1/models/a%2Fb/", "", "/v1/models/a%2Fb"),
        ("*", "", "*"),
    ],
)
async def test_paths_lose_prefixes_and_needless_slashes(path, root, found):
    assert canonical(path, root) == found


async def test_every_spelling_of_a_path_reaches_its_route_and_none_goes_around_a_key(engine, address):
    for path in ("//v1/models", "/v1/models/?x=//y", "/llm/v1/models", "http://here//v1/models/"):
        assert final(await answered(address, written(path, None, "connection: close", method="GET")))[0] == 200, path
    async with running(engine, Config.of(port=0, api_key="secret")) as other:
        there = other.removeprefix("http://").split(":")
        for path in ("//v1/plan", "/v1/plan/", "//v1/models/"):
            status = final(await answered(there, written(path, None, "connection: close", method="GET")))[0]
            assert status == 401, path
        status = final(await answered(there, written("//v1//plan/", {"plan": "auto"}, "connection: close")))[0]
        assert status == 403


async def test_an_unknown_expectation_gets_openais_error_shape(address):
    for path in (COMPLETE, "/nowhere"):
        sent = written(path, HELLO, "expect: nonsense", "x-request-id: mine", "connection: close")
        status, head, body = final(await answered(address, sent))
        assert (status, json.loads(body)["error"]["code"]) == (417, "expectation_failed")
        assert b"x-request-id: mine" in head
    status, _, _ = final(await answered(address, written(COMPLETE, HELLO, "expect: 100-continue", "connection: close")))
    assert status == 200


async def test_a_client_that_shuts_its_writing_side_gets_its_answers(address):
    status, _, body = final(await answered(address, written(COMPLETE, HELLO), half=True))
    assert (status, json.loads(body)["object"]) == (200, "text_completion")
    streamed = await answered(address, written(COMPLETE, HELLO | {"stream": True}), half=True)
    assert b"data: [DONE]" in streamed
    assert (await answered(address, written(COMPLETE, HELLO) * 3, half=True)).count(b" 200 OK") == 3
    assert await answered(address, written(COMPLETE, HELLO)[:-3], half=True) == b""
    assert await answered(address, b"", half=True) == b""


async def test_a_client_that_waits_longer_than_the_probe_gets_its_answer(address, monkeypatch):
    monkeypatch.setattr(connection, "PROBE_AFTER", 0.01)
    answer = await answered(address, written(COMPLETE, LONG), half=True)
    assert final(answer.replace(connection.INTERIM, b""))[0] == 200
    assert b"[DONE]" in await answered(address, written(COMPLETE, LONG | {"stream": True}), half=True)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_has_left_frees_its_row(engine, address, streamed, monkeypatch):
    monkeypatch.setattr(connection, "PROBE_AFTER", 0.01)  # sooner than the answer, on any machine
    _, writer = await asyncio.open_connection(*address)
    writer.write(written(COMPLETE, LONG | {"stream": streamed}))
    while not engine.streams:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    (stream,) = engine.streams.values()
    writer.close()
    await asyncio.wait_for(engine.idle.wait(), 60)
    assert stream.chunks[-1] is None  # cancelled, and not finished


@pytest.mark.parametrize(
    ("host", "families"),
    [
        ("127.0.0.1", {socket.AF_INET}),
        ("0.0.0.0", {socket.AF_INET}),
        ("127.0.0.1,127.0.0.2", {socket.AF_INET}),
        ("::", {socket.AF_INET6}),
        ("::,0.0.0.0", {socket.AF_INET, socket.AF_INET6}),
        ("127.0.0.1, [::1]", {socket.AF_INET, socket.AF_INET6}),
    ],
)
async def test_several_addresses_share_a_port_and_answer_only_once_somebody_listens(host, families):
    if socket.AF_INET6 in families and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with listening.bound(host, 0) as sockets:
        port = sockets[0].getsockname()[1]
        assert {one.family for one in sockets} == families
        assert {one.getsockname()[1] for one in sockets} == {port}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(ConfigError, match="in use; choose another --port"), listening.bound(host, port):
            pass
        for one in sockets:
            listening.inheritable(one).listen()
        socket.create_connection(("127.0.0.1", port)).close()  # :: alone takes IPv4 too


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_localhost_needs_only_one_of_its_addresses_and_wrong_hosts_are_told():
    with listening.bound("localhost", 0) as sockets:
        assert sockets
    for host, pattern in {
        "999.1.1.1": "is --host an address of this machine",
        "192.0.2.1": "is --host an address",
        "a,,b": "empty",
    }.items():
        with pytest.raises(ConfigError, match=pattern), listening.bound(host, 0):
            pass


async def test_a_server_answers_on_all_its_addresses(engine):
    async with running(engine, Config.of(host="127.0.0.1,127.0.0.2", port=0)) as shown:
        found = re.findall(r"http://([\d.]+):(\d+)", shown)
        assert [host for host, _ in found] == ["127.0.0.1", "127.0.0.2"]
        for there in found:
            assert final(await answered(there, written("/health", None, "connection: close", method="GET")))[0] == 200


async def test_aiohttp_still_has_what_connections_build_on():
    needed = {"_messages", "_waiter", "_force_close", "_current_request", "_request_factory"}
    assert needed <= set(web.RequestHandler.__slots__)
