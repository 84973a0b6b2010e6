"""Answers and streams over HTTP: what OpenAI's clients send and expect."""

import asyncio

import openai
import pytest
from http_requests import CHAT, COMPLETE, HELLO, post, stream

from dilaserve import Options
from dilaserve.engine.stream import Chunk
from dilaserve.server.responses import ResponseFormat

pytestmark = pytest.mark.asyncio(loop_scope="module")
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
    "resumed_tokens",
}


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
    counts = {"prompt_tokens": prompt, "completion_tokens": 24, "total_tokens": prompt + 24}
    assert body["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
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


async def test_each_chunk_counts_the_tokens_so_far_where_that_is_asked_for(client):
    """As guidellm and aiperf ask, to divide by the tokens of a chunk."""
    wanted = {"include_usage": True, "continuous_usage_stats": True, "include_canvas": True}
    *chunks, last = await stream(client, CHAT, HELLO | {"n": 2, "stream_options": wanted})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (counts[0], counts[-1]) == (0, last["usage"]["completion_tokens"])
    assert counts == sorted(counts)
    for one in (chunk["usage"] for chunk in chunks):
        assert one["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"]


async def test_tokens_without_text_are_a_chunk_too(engine):
    """As of a request that ignores end tokens; vllm's bench counts an answer without chunks as failed."""
    form = ResponseFormat(engine, True, False)
    said = form.delta(0, Chunk("", token_ids=(7,)))
    assert said
    assert said["choices"][0]["delta"] == {"content": ""}
    assert form.delta(0, Chunk("")) is None


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
    assert len(engine.consumer.free) == engine.table.rows


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
        for wish in ({"max_tokens": 4}, {"max_tokens": 24, "max_completion_tokens": 4}):
            assert (await post(client, path, body | wish))[1]["usage"]["completion_tokens"] == 4


async def test_n_choices_count_the_seed_up(client):
    wish = HELLO | {"temperature": 1.0, "seed": 7}
    _, both, _ = await post(client, CHAT, wish | {"n": 2})
    singles = [(await post(client, CHAT, wish | {"seed": seed}))[1] for seed in (7, 8)]
    texts = [choice["message"]["content"] for choice in both["choices"]]
    assert texts == [body["choices"][0]["message"]["content"] for body in singles]
    assert texts[0] != texts[1]
    chunks = await stream(client, CHAT, wish | {"n": 2})
    for index, text in enumerate(texts):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert mine[-1]["finish_reason"] == "length"


async def test_a_block_longer_than_the_answer_is_one_block(client):
    wish = HELLO | {"max_tokens": 200}
    _, long, _ = await asyncio.wait_for(post(client, CHAT, wish | {"block_length": 2**31}), 30)
    _, exact, _ = await post(client, CHAT, wish | {"block_length": 256 - long["usage"]["prompt_tokens"]})
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
