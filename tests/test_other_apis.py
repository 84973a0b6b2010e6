"""/v1/responses and /v1/messages through their own clients: sync and async, streaming and not, and errors."""

import asyncio

import anthropic
import openai
import pytest
import pytest_asyncio
from http_requests import CHAT, post

from dilaserve import Config, Options
from dilaserve.errors import OURS, RequestFailed
from dilaserve.server.app import running

pytestmark = pytest.mark.asyncio(loop_scope="module")
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
OPTIONS = Options(max_tokens=24, block_length=8)
OWN = {"block_length": 8}
RESPONSE = {
    "model": "random",
    "instructions": "Be brief.",
    "input": "hello",
    "max_output_tokens": 24,
    "extra_body": OWN,
}
MESSAGE = {"model": "random", "system": "Be brief.", "messages": [ASKED[1]], "max_tokens": 24, "extra_body": OWN}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def known(engine):
    """What the engine itself answers."""
    return await engine.generate(ASKED, OPTIONS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(engine):
    """The address of the same engine behind a key."""
    async with running(engine, Config.of(port=0, api_key="secret")) as address:
        yield address


def stop_in(text):
    """Some characters of the text that stand nowhere before."""
    return next(
        text[i : i + 3] for i in range(4, len(text)) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i
    )


# OpenAI's responses


async def test_openais_client_reads_a_response(address, known):
    async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="none") as client:
        answer = await client.responses.create(**RESPONSE, metadata={"run": "7"}, temperature=0)
        assert (answer.output_text, answer.status) == (known.text, "incomplete")
        assert (answer.incomplete_details.reason, answer.metadata) == ("max_output_tokens", {"run": "7"})
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (known.prompt_tokens, 24)
        assert answer.usage.input_tokens_details.cached_tokens == 0
        assert (answer.store, answer.instructions, answer.previous_response_id) == (False, "Be brief.", None)
        assert answer.dilaserve["steps"] == known.usage.steps
        stop = stop_in(known.text)
        cut = await client.responses.create(**RESPONSE | {"extra_body": OWN | {"stop": stop}})
        assert (cut.output_text, cut.status) == (known.text.partition(stop)[0], "completed")
        sure = await client.responses.create(**RESPONSE, include=["message.output_text.logprobs"])
        bare = await client.responses.create(**RESPONSE, include=["reasoning.encrypted_content"])
        assert (bare.output_text, bare.output[0].content[0].logprobs) == (known.text, [])
        logprobs = sure.output[0].content[0].logprobs
        assert (len(logprobs), all(one.logprob <= 0 for one in logprobs)) == (24, True)


async def test_openais_client_reads_the_events_of_a_response(address, known):
    async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="none") as client:
        events = [event async for event in await client.responses.create(**RESPONSE, stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type.removeprefix("response.") for event in events]
        opening = ["created", "in_progress", "output_item.added", "content_part.added"]
        closing = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
        assert (kinds[:4], kinds[-4:], set(kinds[4:-4])) == (opening, closing, {"output_text.delta"})
        assert len(kinds) > 9
        assert "".join(event.delta for event in events[4:-4]) == known.text == events[-4].text
        assert events[-1].response.output_text == known.text
        assert events[-1].response.usage.total_tokens == known.prompt_tokens + 24
        async with client.responses.stream(**RESPONSE | {"extra_body": OWN | {"stop": stop_in(known.text)}}) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[-1] == "response.completed"
        assert final.output_text == known.text.partition(stop_in(known.text))[0]


async def test_openais_sync_client_reads_responses_and_errors(address, known):
    def asked():
        with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
            assert client.responses.create(**RESPONSE).output_text == known.text
            pieces = [
                event.delta for event in client.responses.create(**RESPONSE, stream=True) if "delta" in event.type
            ]
            assert "".join(pieces) == known.text
            with pytest.raises(openai.BadRequestError, match="max_output_tokens") as caught:
                client.responses.create(**RESPONSE | {"max_output_tokens": 100_000})
            assert caught.value.param == "max_output_tokens"
            with pytest.raises(openai.NotFoundError):
                client.responses.create(model="gpt-4", input="hello")

    await asyncio.to_thread(asked)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call"}]}, "input[0].name"),
        ({"instructions": "x", "input": [{"role": "boss", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"stop": [""]}, "stop"),
        ({"slo": {"class": "gold"}}, "slo.class"),
    ],
)
async def test_what_a_response_cannot_honour_is_refused_by_name(client, wish, param):
    status, body, _ = await post(client, RESPONSES, {"input": "hello"} | wish)
    assert (status, body["error"]["param"]) == (400, param), body


async def test_items_of_a_response_say_what_messages_of_a_chat_say(client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    chat = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    unused = {"tools": [{"type": "function", "name": "weather"}], "tool_choice": "none"}
    _, known, _ = await post(client, CHAT, {"messages": chat, "max_tokens": 8, **unused})
    _, answer, _ = await post(client, RESPONSES, {"input": items, "max_output_tokens": 8, **unused})
    assert answer["output"][0]["content"][0]["text"] == known["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == known["usage"]["prompt_tokens"]


async def test_own_fields_and_headers_work_on_all_endpoints(client):
    for path, body in ((RESPONSES, {"input": "hi"}), (MESSAGES, {"messages": [ASKED[1]], "max_tokens": 8})):
        own = {"confidence_threshold": 0.5, "slo": {"deadline_ms": 60_000}, "temprature": 0, "deadline_ms": 5}
        _, answer, _ = await post(client, path, body | own)
        assert (answer["dilaserve"]["deadline"], answer["dilaserve"]["mean_threshold"]) == (60.0, 0.5)
        assert [warning.partition("mean ")[2] for warning in answer["warnings"]] == [
            "'temperature'?",
            "'slo.deadline_ms'?",
        ]
        _, answer, _ = await post(client, path, body, **{"x-slo-deadline-ms": "50000"})
        assert answer["dilaserve"]["deadline"] == 50.0


async def test_an_error_within_a_stream_is_raised_by_both_clients(address, engine):
    """The streams are long enough to be still running when their first event has come."""
    slow, kinds = {"extra_body": {"num_denoising_steps": 150}}, []

    def fail():
        for stream in list(engine.streams.values()):
            engine.consumer.delivery.drop(stream, RequestFailed(OURS))

    async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="none") as client:
        stream = await client.responses.create(**RESPONSE | slow | {"max_output_tokens": 150}, stream=True)
        await anext(stream)
        fail()
        with pytest.raises(openai.APIError, match="on our side"):
            _ = [kinds.append(event.type) async for event in stream]
        assert kinds[-1] == "response.failed"
    async with anthropic.AsyncAnthropic(base_url=address, api_key="none") as client:
        events = await client.messages.create(**MESSAGE | slow | {"max_tokens": 150}, stream=True)
        await anext(events)
        fail()
        with pytest.raises(anthropic.APIStatusError, match="on our side"):
            _ = [event async for event in events]


# Anthropic's messages


async def test_anthropics_client_reads_a_message(address, known):
    async with anthropic.AsyncAnthropic(base_url=address, api_key="none") as client:
        answer = await client.messages.create(**MESSAGE)
        assert ([block.text for block in answer.content], answer.stop_reason) == ([known.text], "max_tokens")
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (known.prompt_tokens, 24)
        assert answer.dilaserve["steps"] == known.usage.steps
        stop = stop_in(known.text)
        cut = await client.messages.create(**MESSAGE, stop_sequences=["never so", stop])
        assert (cut.content[0].text, cut.stop_reason) == (known.text.partition(stop)[0], "stop_sequence")
        assert cut.stop_sequence == stop
        counted = await client.messages.count_tokens(model="random", system="Be brief.", messages=[ASKED[1]])
        assert counted.input_tokens == known.prompt_tokens


async def test_anthropics_client_reads_the_events_of_a_message(address, known):
    async with anthropic.AsyncAnthropic(base_url=address, api_key="none") as client:
        events = [event async for event in await client.messages.create(**MESSAGE, stream=True)]
        kinds = [event.type for event in events]
        closing = ["content_block_stop", "message_delta", "message_stop"]
        assert (kinds[:2], kinds[-3:]) == (["message_start", "content_block_start"], closing)
        assert (set(kinds[2:-3]), len(kinds) > 6) == ({"content_block_delta"}, True)
        assert events[0].message.usage.input_tokens == known.prompt_tokens
        async with client.messages.stream(**MESSAGE) as stream:
            assert "".join([text async for text in stream.text_stream]) == known.text
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 24)


async def test_anthropics_sync_client_reads_messages_and_errors(address, keyed, known):
    def asked():
        with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
            assert client.messages.create(**MESSAGE).content[0].text == known.text
            with client.messages.stream(**MESSAGE) as stream:
                assert stream.get_final_text() == known.text
            with pytest.raises(anthropic.BadRequestError, match="max_tokens") as caught:
                client.messages.create(**MESSAGE | {"max_tokens": 10_000})
            assert caught.value.body["error"]["type"] == "invalid_request_error"
            with pytest.raises(anthropic.NotFoundError) as caught:
                client.messages.create(**MESSAGE | {"model": "claude"})
            assert caught.value.body["error"]["type"] == "not_found_error"
        with anthropic.Anthropic(base_url=keyed, api_key="secret") as client:
            assert client.messages.create(**MESSAGE).content[0].text == known.text
        with anthropic.Anthropic(base_url=keyed, api_key="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                client.messages.create(**MESSAGE)
            assert caught.value.body["request_id"] == caught.value.response.headers["x-request-id"]

    await asyncio.to_thread(asked)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools"),
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "any"}}, "tools"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name"),
        ({"system": "x", "messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        ({"metadata": {"user_id": "x" * 600}}, "metadata.user_id"),
    ],
)
async def test_what_a_message_cannot_honour_is_refused_in_anthropics_shape(client, wish, param):
    status, body, _ = await post(client, MESSAGES, {"messages": [ASKED[1]], "max_tokens": 8} | wish)
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert body["error"]["param"] == param, body


async def test_blocks_of_a_message_say_what_messages_of_a_chat_say(client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "So?"},
    ]
    blocks = [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]
    unused = {"tools": [{"name": "weather", "input_schema": {}}], "tool_choice": {"type": "none"}}
    _, known, _ = await post(client, CHAT, {"messages": chat, "max_tokens": 8})
    wish = {"system": system, "messages": blocks, **unused}
    _, answer, _ = await post(client, MESSAGES, wish | {"max_tokens": 8})
    assert answer["content"] == [{"type": "text", "text": known["choices"][0]["message"]["content"]}]
    assert (await post(client, COUNT, wish))[1] == {"input_tokens": known["usage"]["prompt_tokens"]}
