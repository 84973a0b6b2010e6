"""The edge of the server: bodies that are meant to hurt, connections that end early, and what stands before a route."""

import asyncio
import json
import re
import socket
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dilaserve import Config, Engine, Options
from dilaserve.engine.assembly import named
from dilaserve.errors import BadRequest, ConfigError, RequestFailed, Unavailable
from dilaserve.server import connection, json_shape, listening
from dilaserve.server.app import running
from dilaserve.server.intake import Claim, Intake
from dilaserve.server.loop_share import LoopShare
from dilaserve.server.paths import canonical
from dilaserve.tokenizer.panics import Panic, contained

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import stalls

pytestmark = pytest.mark.asyncio(loop_scope="module")
COMPLETE = "/v1/completions"
HELLO = {"prompt": "hello", "max_tokens": 8}
LONG = {"prompt": "hello", "max_tokens": 240, "block_length": 1}
STALL = 0.5  # seconds: ten times what an idle machine is held to, for this one is busy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    config = Config.of(model=str(random_model), devices="cpu", port=0, root_path="llm/", max_choices=4)
    async with Engine(config) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(engine):
    async with running(engine, engine.config) as address:
        yield address.removeprefix("http://").split(":")


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


# bodies


@pytest.fixture(scope="module")
def target():
    with stalls.server() as target:
        yield target


@pytest.fixture(scope="module")
def shapes():
    return stalls.shapes()


@pytest.mark.parametrize("name", stalls.shapes(1000))
async def test_no_body_stalls_the_event_loop(target, shapes, name):
    seen = await asyncio.to_thread(stalls.drive, target, shapes[name], 4)
    assert seen.statuses <= {200, 400, 408, 413, 503}
    assert seen.stall < STALL, seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def parts(value):
    """Numbers of containers and of strings."""
    if isinstance(value, str):
        return 0, 1
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [parts(one) for one in inner]
    return isinstance(value, list | dict) + sum(one[0] for one in found), sum(one[1] for one in found)


@given(JSON, st.integers(1, 50), st.booleans())
async def test_what_a_body_holds_is_counted_the_same_in_any_pieces(value, size, ascii):
    body, counter = json.dumps(value, ensure_ascii=ascii).encode(), json_shape.Counter()
    for start in range(0, len(body), size):
        counter.add(body[start : start + size])
    containers, strings = parts(value)
    assert (counter.found.containers, counter.found.strings) == (containers, 2 * strings)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * (json_shape.CONTAINERS + 1),
        b'{"prompt": [1' + b",1" * (json_shape.NUMBERS + 1),
        b'["a"' + b',"a"' * json_shape.STRINGS,
        b"[1" + b",1e5" * (json_shape.FRACTIONS + 1),
        b"[1" + b",1.5" * (json_shape.FRACTIONS + 1),
        b'"' + b"\\n" * (json_shape.ESCAPES + 1) + b'"',
    ],
)
async def test_a_body_that_holds_too_much_is_refused_before_it_is_decoded(body):
    with pytest.raises(BadRequest, match="the body holds more than"):
        json_shape.check(body)


async def test_text_may_hold_any_number_of_brackets():
    json_shape.check(json.dumps({"prompt": "[{,.e" * 200_000, "stop": ['"\\', "\\"]}).encode())


async def test_bodies_in_flight_are_bounded_and_short_ones_find_room():
    intake = Intake(1_000_000, 4_000_000)
    try:
        claims = [Claim(intake) for _ in range(4)]
        for claim in claims[:3]:
            claim.grow(1_000_000)
        with pytest.raises(Unavailable, match="--max-inflight-bytes") as refused:
            claims[3].grow(1_000_000)
        assert refused.value.retry_after == 1.0
        claims[3].grow(100)
        claims[0].shrink(0)
        claims[3].grow(900_000)
        for claim in claims:
            claim.shrink(0)
        assert intake.held == 0
    finally:
        intake.close()
    with pytest.raises(ConfigError, match="--max-inflight-bytes 5 is less than"):
        Config.of(max_inflight_bytes=5)
    assert Config.of(max_body_bytes=100).server.inflight_bytes == 1600


async def test_unfinished_bodies_take_no_more_memory_than_allowed_and_give_it_back():
    with stalls.server("max_inflight_bytes=16777216") as target:
        before, within, after = await asyncio.to_thread(stalls.unfinished, target, 100)
    assert within - before < 200 * 2**20, (before, within)  # of 400 MiB that were sent
    assert after - before < 100 * 2**20, (before, after)


async def test_work_gets_half_of_the_loop(monkeypatch):
    now, slept = [0.0], []

    async def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("dilaserve.server.loop_share.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("dilaserve.server.loop_share.asyncio.sleep", sleep)
    pace = LoopShare()

    def work():
        now[0] += 0.010

    for _ in range(3):
        await pace.run(work)
    assert slept == [pytest.approx(0.008), pytest.approx(0.010)]


async def test_a_request_that_needs_no_room_is_answered_while_bodies_wait(address):
    waiting = written(COMPLETE, HELLO)[:-5]
    writers = [(await asyncio.open_connection(*address))[1] for _ in range(20)]
    for writer in writers:
        writer.write(waiting)
    assert final(await answered(address, written("/health", None, "connection: close", method="GET")))[0] == 200
    for writer in writers:
        writer.close()


# panics


async def test_a_panic_while_a_prompt_is_encoded_fails_one_request_and_is_logged(engine, address, caplog):
    tokenizer = engine.text.tokenizer
    tokenizer.enable_padding(length=2**62)  # more than there is memory
    try:
        for path in ("/tokenize", COMPLETE):
            status, head, body = final(await answered(address, written(path, {"prompt": "hi"}, "connection: close")))
            assert (status, json.loads(body)["error"]["code"]) == (500, "tokenizer_failed")
            assert b"x-request-id" in head
        with pytest.raises(RequestFailed):
            await engine.generate("hi", Options(max_tokens=4))
    finally:
        tokenizer.no_padding()
    assert "capacity overflow" in caplog.text
    assert final(await answered(address, written(COMPLETE, HELLO, "connection: close")))[0] == 200


class Panicking:
    """A tokenizer whose decoder panics, for a text that its own decoder panics at."""

    def __init__(self, tokenizer):
        self.encode = tokenizer.encode
        self.broken = Tokenizer(models.BPE({"a": 0}, []))
        self.broken.decoder = decoders.Strip("a", 0, 10_000)

    def decode(self, ids, skip_special_tokens):
        return self.broken.decode([0])


async def test_a_panic_while_an_answer_is_decoded_fails_one_request_and_frees_its_row(engine, address, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.text, "tokenizer", Panicking(engine.text.tokenizer))
        with pytest.raises(RequestFailed):
            await engine.generate("hi", Options(max_tokens=4))
        streamed = await answered(address, written(COMPLETE, LONG | {"stream": True}, "connection: close"))
        assert b'"code":"tokenizer_failed"' in streamed
        for path, body in ((COMPLETE, HELLO), ("/detokenize", {"tokens": [1]})):
            assert final(await answered(address, written(path, body, "connection: close")))[0] == 500
        await asyncio.wait_for(engine.idle.wait(), 30)
    assert len(engine.free) == engine.table.rows
    assert final(await answered(address, written(COMPLETE, HELLO, "connection: close")))[0] == 200


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, ValueError])
async def test_only_panics_are_contained(kind):
    with pytest.raises(kind), contained():
        raise kind
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(Panic, match="out of range"), contained():
        raise panic("out of range")


# before a route


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


# clients that shut their side


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


# addresses


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


# names


async def test_a_model_is_called_as_it_was_given(tmp_path):
    snapshot = tmp_path / "models--GSAI-ML--LLaDA-8B" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (tmp_path / "llada").symlink_to(snapshot)
    assert named(tmp_path / "llada") == "llada"
    assert named(tmp_path / "llada" / "") == "llada"
    assert named(snapshot) == "GSAI-ML/LLaDA-8B"
    assert named(Path("tests/..")) == Path.cwd().name


async def test_aiohttp_still_has_what_connections_build_on():
    needed = {"_messages", "_waiter", "_force_close", "_current_request", "_request_factory"}
    assert needed <= set(web.RequestHandler.__slots__)
