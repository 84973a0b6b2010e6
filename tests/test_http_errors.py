"""Requests that cannot be served: each gets an error in OpenAI's shape that names the field."""

import asyncio
import gzip
import json
import random
import zlib

import aiohttp
import pytest
from http_requests import CHAT, COMPLETE, HELLO, post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilaserve import Config, Engine
from dilaserve.server import app, routes
from dilaserve.server.app import running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-slo-deadline-ms": "soon"}, "x-slo-deadline-ms"),
        ({"x-priority": "1.5"}, "x-priority"),
        ({"x-slo-deadline-ms": "nan"}, "slo.deadline_ms"),
        ({"x-slo-deadline-ms": "5000", "x-slo-class": "slow"}, "slo"),
        ({"x-slo-class": "gold"}, "slo.class"),
        ({"x-priority": "99"}, "priority"),
    ],
)
async def test_headers_of_gateways_are_refused_by_name(client, headers, param):
    status, body, _ = await post(client, CHAT, HELLO, **headers)
    assert (status, body["error"]["param"]) == (400, param)
    assert next(iter(headers.values())) in body["error"]["message"] or param.startswith("slo")


async def test_a_compressed_body_is_read_and_no_more_is_made_of_it_than_allowed(client):
    """By ourselves: what inflates bodies for us does so without a bound, also behind a refusal."""
    whole = gzip.compress(json.dumps({"prompt": "hello"}).encode())
    bodies = {
        "gzip": [(whole, 200), (whole[:-9], 400), (whole + b"more", 400), (gzip.compress(bytes(50_000_000)), 413)],
        "deflate": [(zlib.compress(b'{"prompt": "hello"}'), 200), (b"{}", 400)],
    }
    for encoding, sent in bodies.items():
        headers = {"content-type": "application/json", "content-encoding": encoding}
        for data, wanted in sent:
            async with client.post("/tokenize", data=data, headers=headers) as response:
                assert response.status == wanted


@pytest.mark.parametrize(
    ("path", "change", "status", "param"),
    [
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": "hi"}, 400, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 300}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 90_000}]}, 400, "messages"),
        (CHAT, {"messages": [{}]}, 400, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, 400, "messages[0].content[0].type"),
        (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens"),
        (COMPLETE, {"prompt": "a" * 90_000}, 400, "prompt"),
        (COMPLETE, {}, 400, "prompt"),
        (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"max_tokens": "many"}, 400, "max_tokens"),
        (CHAT, {"max_tokens": 10**400}, 400, "max_tokens"),
        (CHAT, {"max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
        (CHAT, {"temperature": 3}, 400, "temperature"),
        (CHAT, {"top_p": 0}, 400, "top_p"),
        (CHAT, {"n": 0}, 400, "n"),
        (CHAT, {"n": 5}, 400, "n"),
        (CHAT, {"stop": ["a"] * 17}, 400, "stop"),
        (CHAT, {"seed": 2**64}, 400, "seed"),
        (CHAT, {"decode": "magic"}, 400, "decode"),
        (CHAT, {"cache": "all"}, 400, "cache"),
        (CHAT, {"confidence_threshold": 2}, 400, "confidence_threshold"),
        (CHAT, {"num_denoising_steps": 0}, 400, "num_denoising_steps"),
        (CHAT, {"min_tokens": 25}, 400, "min_tokens"),
        (CHAT, {"stop_token_ids": [5000]}, 400, "stop_token_ids"),
        (CHAT, {"guided_json": {}}, 400, "guided_json"),
        (CHAT, {"top_logprobs": 20, "logprobs": True}, 400, "top_logprobs"),
        (CHAT, {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        (CHAT, {"logit_bias": {"5": 1}}, 400, "logit_bias"),
        (CHAT, {"tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format"),
        (CHAT, {"modalities": ["audio"]}, 400, "modalities"),
        (CHAT, {"slo": {"deadline_ms": -1}}, 400, "slo.deadline_ms"),
        (CHAT, {"slo": {"class": "gold"}}, 400, "slo.class"),
        (CHAT, {"slo": {"class": "gold", "deadline_ms": 5}}, 400, "slo"),
        (CHAT, {"slo": {"deadline": 5}}, 400, "slo"),
        (CHAT, {"slo": {"on_miss": "panic"}}, 400, "slo.on_miss"),
        (CHAT, {"priority": 99}, 400, "priority"),
        (CHAT, {"slo": {"priority": 99}}, 400, "slo.priority"),
        (CHAT, {"slo": {"min_confidence_threshold": 2}}, 400, "slo.min_confidence_threshold"),
        (CHAT, {"priority": -(10**400)}, 400, "priority"),
        (CHAT, {"user": "u" * 1000}, 400, "user"),
        (CHAT, {"min_confidence_threshold": 2}, 400, "min_confidence_threshold"),
        (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        (CHAT, {"stream_options": {"continuous_usage_stats": True}}, 400, "stream_options"),
        (CHAT, {"model": "gpt-4"}, 404, "model"),
        (COMPLETE, {"prompt": None}, 400, "prompt"),
        (COMPLETE, {"prompt": ""}, 400, "prompt"),
        (COMPLETE, {"prompt": []}, 400, "prompt"),
        (COMPLETE, {"prompt": ["a", 3]}, 400, "prompt"),
        (COMPLETE, {"prompt": [5000]}, 400, "prompt"),
        (COMPLETE, {"prompt": [-1]}, 400, "prompt"),
        (COMPLETE, {"prompt": [2**70], "echo": True}, 400, "prompt"),
        (COMPLETE, {"prompt": ["a"] * 5}, 400, "prompt"),
        (COMPLETE, {"prompt": ["a"] * 2, "n": 3}, 400, "n"),
        (COMPLETE, {"prompt": "a", "logprobs": 20}, 400, "logprobs"),
        (COMPLETE, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        (CHAT, {"suffix": "b"}, 400, "suffix"),
        (COMPLETE, {"prompt": "a", "response_format": {"type": "json_object"}}, 400, "response_format"),
        (COMPLETE, {"prompt": "a", "tools": [{"type": "function"}]}, 400, "tools"),
        (COMPLETE, {"prompt": "a", "top_logprobs": 1}, 400, "top_logprobs"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(client, path, change, status, param):
    found, body, headers = await post(client, path, (HELLO if path == CHAT else {}) | change)
    assert (found, body["error"]["param"]) == (status, param)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) > 10
    assert headers["x-request-id"]


async def test_more_choices_than_the_engine_has_rows_are_refused_without_retry(random_model):
    config = Config.of(model=str(random_model), devices="cpu", port=0, max_queue=1)
    async with Engine(config) as engine, running(engine, config) as address, aiohttp.ClientSession(address) as client:
        status, body, _ = await post(client, CHAT, HELLO | {"n": 2})
        assert (status, body["error"]["param"], "--max-queue" in body["error"]["message"]) == (400, "n", True)


async def test_no_route_repeats_more_of_what_was_sent_than_its_share(client):
    long = "Z" * 5000
    sent = [
        *[(CHAT, HELLO | {name: long}, {}) for name in ("model", "decode", "cache", "max_tokens", "tools", "user")],
        (CHAT, HELLO | {"slo": {"class": long}}, {}),
        (CHAT, HELLO | {"slo": {"on_miss": long}}, {}),
        (CHAT, HELLO | {"slo": {long: 1}}, {}),
        (CHAT, HELLO | {"messages": [{"role": long, "content": "x"}]}, {}),
        (CHAT, HELLO | {"messages": [{"role": "user", "content": [{"type": long}]}]}, {}),
        (CHAT, HELLO, {"x-slo-deadline-ms": long}),
        (CHAT, HELLO, {"x-priority": long}),
        (CHAT, HELLO, {"x-slo-class": long}),
        ("/v1/" + long, {}, {}),
        ("/tokenize", {"prompt": "x", "model": long}, {}),
        ("/detokenize", {"tokens": [1], "model": long}, {}),
    ]
    for path, body, headers in sent:
        status, answer, _ = await post(client, path, body, **headers)
        assert (400 <= status < 500, json.dumps(answer).count("Z") <= 100) == (True, True), (path, list(body))
    for path in ("/v1/models/" + long, "/" + long):
        async with client.get(path) as response:
            assert (response.status, (await response.text()).count("Z") <= 100) == (404, True)


async def test_broken_requests_get_openais_error_shape(client):
    async def error(method, path, **how):
        async with client.request(method, path, **how) as response:
            return response.status, (await response.json())["error"]

    json_type = {"content-type": "application/json"}
    assert (await error("POST", CHAT, data=b"{", headers=json_type))[0] == 400
    assert (await error("POST", CHAT, data=b"[]", headers=json_type))[0] == 400
    assert (await error("POST", CHAT, data=b"\xff\xfe", headers=json_type))[0] == 400
    assert (await error("POST", CHAT, data=b"[" * 90_000, headers=json_type))[0] == 400
    assert (await error("POST", CHAT, data=b"{}"))[0] == 415
    assert (await error("POST", CHAT, data=b'"' + b"x" * 200_000 + b'"', headers=json_type))[0] == 413
    status, found = await error("POST", CHAT, data=b"{}", headers=json_type | {"content-encoding": "gzip"})
    assert (status, "content-encoding" in found["message"]) == (400, True)
    assert (await error("POST", CHAT, data=b"{}", headers=json_type | {"content-encoding": "br"}))[0] == 415
    assert (await error("POST", CHAT, data=b"", headers=json_type))[1]["message"] == "the body is empty; send JSON"
    for cut in (rb"\ud83d", rb"\ude00", rb"\ud83d\ud83d\ude00", rb"x\uD83Dx"):  # what JavaScript makes of half an emoji
        status, found = await error("POST", CHAT, data=b'{"prompt": "' + cut + b'"}', headers=json_type)
        assert (status, "half of a surrogate pair" in found["message"]) == (400, True)
    _, found = await error("POST", CHAT, data=rb'{"prompt": "\ud83d\ude00"', headers=json_type)
    assert "truncated" in found["message"]
    assert (await error("GET", "/v1/nothing"))[0] == 404
    assert (await error("GET", CHAT))[0] == 405
    assert (await error("GET", "/v1/models/other"))[1]["param"] == "model"
    assert (await post(client, CHAT, HELLO))[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: here\r\nx-long: " + b"x" * 20_000 + b"\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: here\r\ncontent-length: many\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nmany\r\n",
    ],
)
async def test_what_is_no_http_gets_openais_error_shape_and_no_traceback(address, caplog, sent):
    reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
    writer.write(sent)
    head, _, found = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert b"x-request-id" in head.lower()
    assert set(json.loads(found)["error"]) == {"message", "type", "param", "code"}
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_client_that_leaves_before_its_stream_begins_leaves_no_traceback(engine, caplog, monkeypatch):
    def gone(*_):
        raise ConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(routes.sse, "relay", gone)
    async with running(engine, engine.config) as address, aiohttp.ClientSession(address) as client:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.post(CHAT, json=HELLO | {"stream": True})
    assert not [record for record in caplog.records if record.exc_info]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "messages",
    "prompt",
    "max_tokens",
    "stop",
    "n",
    "seed",
    "temperature",
    "stream",
    "block_length",
    "cache",
    "logprobs",
]


async def test_no_body_causes_a_server_error(client):
    rng, statuses = random.Random(0), set()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.booleans())
    def collect(body, valid):
        bodies.append(({"prompt": "a", "messages": HELLO["messages"], "max_tokens": 2} if valid else {}) | body)

    bodies = []
    collect()
    for body in bodies:
        async with client.post(rng.choice((CHAT, COMPLETE)), json=body) as response:
            statuses.add(response.status)
            await response.read()
    assert statuses <= {200, 400}
    assert (await post(client, CHAT, HELLO))[0] == 200


async def test_a_head_that_never_comes_whole_costs_its_connection(engine, monkeypatch):
    monkeypatch.setattr(app, "IDLE_WITHIN", 0.05)
    async with running(engine, engine.config) as address:
        for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nhost: here\r\nx-slow: "):
            reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
