"""The wire, over real sockets: what OpenAI's clients send and expect."""

import asyncio
import gzip
import json
import os
import random
import signal
import time
import zlib

import aiohttp
import checkpoints
import openai
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilaserve import Config, Engine, Options
from dilaserve.server import app, routes
from dilaserve.server.app import running
from dilaserve.server.responses import HeldBackTokens, ResponseFormat, Token
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
COSTS = {
    "steps",
    "refreshes",
    "queued",
    "served",
    "mean_confidence",
    "deadline",
    "deadline_met",
    "min_threshold",
    "mean_threshold",
    "expected_accuracy_drop",
}
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "block_length": 8}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    config = Config.of(
        model=str(random_model),
        devices="cpu",
        port=0,
        max_body_bytes=100_000,
        max_choices=4,
        slo_class="slow=1000x,none=none",
    )
    async with Engine(config) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(engine):
    async with running(engine, engine.config) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="module")
async def client(address):
    async with aiohttp.ClientSession(address) as session:
        yield session


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


async def test_a_chat_answer_has_openais_shape(client, engine):
    status, body, headers = await post(client, CHAT, HELLO, **{"x-request-id": "mine-1"})
    assert (status, headers["x-request-id"]) == (200, "mine-1")
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    known = await engine.generate(HELLO["messages"], Options(max_tokens=24, block_length=8))
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": known.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    prompt = known.prompt_tokens
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 24, "total_tokens": prompt + 24}
    assert body["dilaserve"]["steps"] == known.usage.steps
    assert body["dilaserve"]["refreshes"] == 3
    fate = body["dilaserve"]
    assert set(fate) == COSTS
    assert (fate["deadline"], fate["deadline_met"], fate["expected_accuracy_drop"]) == (None, None, 0.0)
    assert (fate["min_threshold"], fate["mean_threshold"]) == (0.9, pytest.approx(0.9))


async def test_a_chat_stream_is_written_chunk_by_chunk(client):
    _, whole, _ = await post(client, CHAT, HELLO)
    chunks = await stream(client, CHAT, HELLO | {"stream_options": {"include_usage": True}})
    first, *deltas, last, usage = chunks
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    assert len(deltas) > 1
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in deltas)
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert last["dilaserve"]["steps"] == whole["dilaserve"]["steps"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_a_request_with_time_to_spare_meets_its_deadline(client):
    for slo, headers in (({"deadline_ms": 60_000}, {}), (None, {"x-slo-deadline-ms": "60000", "x-priority": "1"})):
        status, body, _ = await post(client, CHAT, HELLO | {"slo": slo}, **headers)
        assert status == 200
        assert (body["dilaserve"]["deadline"], body["dilaserve"]["deadline_met"]) == (60.0, True)
        assert body["dilaserve"]["mean_threshold"] == pytest.approx(0.9)
    *_, last = await stream(client, CHAT, HELLO | {"slo": {"class": "slow"}})
    assert last["dilaserve"]["deadline_met"] is True
    _, body, _ = await post(client, CHAT, HELLO, **{"x-slo-class": "none"})
    assert body["dilaserve"]["deadline_met"] is None


async def test_a_deadline_that_cannot_be_met_ends_as_the_client_wishes(client, engine):
    while not engine.scheduler.deadlines.admits:  # nobody is turned away on a guess of what steps cost
        await post(client, CHAT, HELLO)
    hurried = HELLO | {"slo": {"deadline_ms": 0.01}}
    status, body, _ = await post(client, CHAT, hurried)
    assert (status, body["dilaserve"]["deadline_met"]) == (200, False)
    for miss, streamed in (("reject", False), ("reject", True), ("cancel_when_late", False)):
        late = hurried | {"slo": {"deadline_ms": 0.01, "on_miss": miss}, "stream": streamed}
        status, body, headers = await post(client, CHAT, late)
        assert (status, body["error"]["code"]) == (429, "deadline")
        assert "even if nothing else runs" in body["error"]["message"]
        assert (headers["x-should-retry"], "retry-after" in headers) == ("false", False)
    assert len(engine.free) == engine.table.rows


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


async def test_completions_take_every_form_of_prompt(client, engine):
    ids = await engine.tokenize("hello")
    texts = []
    for prompt, count in (("hello", 1), (ids, 1), (["hello", "hello"], 2), ([ids, ids], 2)):
        _, body, _ = await post(client, COMPLETE, {"prompt": prompt, "max_tokens": 8})
        assert body["object"] == "text_completion"
        assert [choice["index"] for choice in body["choices"]] == list(range(count))
        assert body["usage"]["prompt_tokens"] == 5 * count
        texts += [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 1
    long = {"tokens": ids * 4000}
    assert (await post(client, "/detokenize", long))[1] == {"prompt": "hello" * 4000}
    chunks = await stream(client, COMPLETE, {"prompt": "hello", "max_tokens": 8, "echo": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello" + texts[0]


async def test_both_endpoints_know_both_names_of_the_answers_length(client):
    for path, body in ((CHAT, HELLO), (COMPLETE, {"prompt": "hello"})):
        for case in ({"max_tokens": 4}, {"max_tokens": 24, "max_completion_tokens": 4}):
            assert (await post(client, path, body | case))[1]["usage"]["completion_tokens"] == 4


async def test_n_choices_count_the_seed_up(client):
    case = HELLO | {"temperature": 1.0, "seed": 7}
    _, both, _ = await post(client, CHAT, case | {"n": 2})
    singles = [(await post(client, CHAT, case | {"seed": seed}))[1] for seed in (7, 8)]
    texts = [choice["message"]["content"] for choice in both["choices"]]
    assert texts == [body["choices"][0]["message"]["content"] for body in singles]
    assert texts[0] != texts[1]
    chunks = await stream(client, CHAT, case | {"n": 2})
    for index, text in enumerate(texts):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert mine[-1]["finish_reason"] == "length"


async def test_log_probabilities_of_the_chosen_tokens(client):
    _, body, _ = await post(client, CHAT, HELLO | {"logprobs": True, "top_logprobs": 0})
    tokens = body["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 24
    assert all(token["logprob"] <= 0 and token["top_logprobs"] == [] for token in tokens)
    _, body, _ = await post(client, COMPLETE, {"prompt": "hello", "max_tokens": 8, "logprobs": 0})
    assert len(body["choices"][0]["logprobs"]["token_logprobs"]) == 8


async def test_offsets_and_bytes_of_log_probabilities_fit_each_choice(client):
    _, chat, _ = await post(client, CHAT, HELLO | {"logprobs": True})
    for token in chat["choices"][0]["logprobs"]["content"]:
        whole = "\ufffd" not in token["token"]
        assert token["bytes"] == (list(token["token"].encode()) if whole else None)
    case = {"prompt": ["hello", "you"], "max_tokens": 8, "block_length": 4, "logprobs": 0, "echo": True}
    _, body, _ = await post(client, COMPLETE, case)
    chunks = await stream(client, COMPLETE, case)
    for index, prompt in enumerate(case["prompt"]):
        found = body["choices"][index]["logprobs"]
        assert found["text_offset"][0] == len(prompt)
        assert found["text_offset"] == sorted(found["text_offset"])
        for start, token in zip(found["text_offset"], found["tokens"], strict=True):
            assert "\ufffd" in token or body["choices"][index]["text"][start:].startswith(token)
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        offsets = [offset for choice in mine for offset in (choice.get("logprobs") or {}).get("text_offset", [])]
        assert offsets == found["text_offset"]


async def test_all_parts_of_a_character_begin_where_it_does(engine):
    form = ResponseFormat(engine, chat=False, logprobs=True)
    told = [Token(id, 1.0) for id in engine.text.encode("é x") if id != checkpoints.BOS]
    assert form.probabilities(0, told)["text_offset"] == [0, 0, 1, 2]


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


async def test_a_block_longer_than_the_answer_is_one_block(client):
    case = HELLO | {"max_tokens": 200}
    _, long, _ = await asyncio.wait_for(post(client, CHAT, case | {"block_length": 2**31}), 30)
    _, exact, _ = await post(client, CHAT, case | {"block_length": 256 - long["usage"]["prompt_tokens"]})
    assert long["choices"] == exact["choices"]


async def test_a_stop_string_cuts_a_stream_without_leaking(client):
    _, whole, _ = await post(client, CHAT, HELLO)
    text = whole["choices"][0]["message"]["content"]
    stop = next(
        text[i : i + 3] for i in range(5, 20) if text[i : i + 3].isprintable() and text.find(text[i : i + 3]) == i
    )
    chunks = await stream(client, CHAT, HELLO | {"stop": [stop, "never so"]})
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert said == text[: text.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_log_probabilities_end_where_a_stop_string_has_cut_the_text(client):
    case = {"prompt": "hello", "max_tokens": 24, "block_length": 4, "logprobs": 0}
    _, whole, _ = await post(client, COMPLETE, case)
    text, probabilities = (whole["choices"][0][name] for name in ("text", "logprobs"))
    at = next(i for i in range(5, 20) if text[i : i + 6].isascii() and text.find(text[i : i + 6]) == i)
    for stop in (text[at : at + 6], "never so"):
        _, cut, _ = await post(client, COMPLETE, case | {"stop": stop})
        found = cut["choices"][0]["logprobs"]
        count = len(found["tokens"])
        assert found == {name: values and values[:count] for name, values in probabilities.items()}
        assert (0 < count < 24, count == 24) == (stop in text, stop not in text)
        chunks = await stream(client, COMPLETE, case | {"stop": stop})
        told = [(chunk["choices"][0].get("logprobs") or {}).get("tokens", []) for chunk in chunks]
        assert [token for tokens in told for token in tokens] == found["tokens"]


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([("um", "u", False), ("al", "", True)], ["u", ""]),  # cut at "mal"
        ([("um", "u", False), ("", "m", True)], ["u", "m"]),
        ([("é", "é", True)], ["é"]),
        ([("é!?", "é", True)], ["é"]),
        ([("a<|eot_id|>", "a", True)], ["a<|eot_id|>"]),
        ([("a<|eot_id|>!", "a", True)], ["a"]),
    ],
)
async def test_a_token_is_told_when_its_text_is_shown(engine, pieces, told):
    form = HeldBackTokens(engine.text)
    shown = [form.shown([Token(id, 1.0) for id in engine.text.encode(ids)], text, ends) for ids, text, ends in pieces]
    found = [
        engine.text.tokenizer.decode([token.id for token in tokens], skip_special_tokens=False) for tokens in shown
    ]
    assert found == told


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
        (CHAT, {"top_logprobs": 3, "logprobs": True}, 400, "top_logprobs"),
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
        (COMPLETE, {"prompt": "a", "logprobs": 2}, 400, "logprobs"),
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


async def test_more_choices_than_the_house_has_places_are_refused_for_good(random_model):
    config = Config.of(model=str(random_model), devices="cpu", port=0, max_queue=1)
    async with Engine(config) as engine, running(engine, config) as address, aiohttp.ClientSession(address) as client:
        status, body, _ = await post(client, CHAT, HELLO | {"n": 2})
        assert (status, body["error"]["param"], "--max-queue" in body["error"]["message"]) == (400, "n", True)


async def test_defaults_nulls_and_unknown_fields_change_nothing(client):
    _, plain, _ = await post(client, CHAT, HELLO)
    harmless = {"frequency_penalty": 0, "tools": [], "tool_choice": "none", "modalities": ["text"], "logit_bias": None}
    harmless |= {
        "top_p": None,
        "n": None,
        "new_field_of_next_month": {"a": 1},
        "user": "u",
        "response_format": {"type": "text"},
    }
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    status, body, _ = await post(client, CHAT, HELLO | harmless | {"messages": [{"role": "user", "content": parts}]})
    assert status == 200
    assert body["choices"] == plain["choices"]


async def test_a_misspelled_field_comes_back_as_a_warning(client, caplog):
    body = HELLO | {"temprature": 0.5}
    _, whole, _ = await post(client, CHAT, body)
    (warning,) = whole["warnings"]
    assert "temprature" in warning
    assert "temperature" in warning
    assert warning in caplog.text
    *_, last = await stream(client, CHAT, body)
    assert last["warnings"] == [warning]
    assert "warnings" not in (await post(client, CHAT, HELLO))[1]


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
    async def gone(*_):
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


async def test_no_body_is_our_fault(client):
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


async def test_64_clients_at_once_each_get_their_own_answer(client):
    bodies = [HELLO | {"messages": [{"role": "user", "content": f"client {i}" * (1 + i % 5)}]} for i in range(64)]
    known = [(await post(client, CHAT, body))[1]["choices"] for body in bodies]
    crowd = await asyncio.gather(*(post(client, CHAT, body) for body in bodies))
    assert [body["choices"] for _, body, _ in crowd] == known


async def test_openais_own_client_is_served(address, engine):
    async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="none") as client:
        assert [model.id for model in (await client.models.list()).data] == ["random"]
        answer = await client.chat.completions.create(
            model="random", messages=HELLO["messages"], max_tokens=16, extra_body={"confidence_threshold": 0.6}
        )
        known = await engine.generate(HELLO["messages"], Options(max_tokens=16, confidence_threshold=0.6))
        assert answer.choices[0].message.content == known.text
        pieces = await client.chat.completions.create(
            model="random",
            messages=HELLO["messages"],
            max_tokens=16,
            stream=True,
            extra_body={"confidence_threshold": 0.6},
        )
        text = "".join([piece.choices[0].delta.content or "" async for piece in pieces])
        assert text == known.text
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.completions.create(model="random", prompt="x", max_tokens=100_000)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="gpt-4", messages=HELLO["messages"])
        assert caught.value.code == "model_not_found"


async def test_the_pages_around_it(client):
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
        await engine.drain(0.0)
        async with client.get("/ready") as response:
            message = (await response.json())["error"]["message"]
    assert (response.status, message) == (503, "the server is draining")


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
    assert len(engine.free) == engine.table.rows
