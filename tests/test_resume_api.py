"""Answers that go on over HTTP: token ids in answers and streams, and what comes behind those that a client has."""

import time

import pytest
from http_requests import CHAT, COMPLETE, HELLO, post, stream

from dilaserve import Options
from dilaserve.server.first_arrival import HEADER

pytestmark = pytest.mark.asyncio(loop_scope="module")
IDS = {"return_token_ids": True}
PROMPT = {"prompt": "hello", "max_tokens": 24, "block_length": 8}
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


def text_of(chunks):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def ids_of(chunks):
    return [id for chunk in chunks for choice in chunk["choices"] for id in choice.get("token_ids", [])]


async def test_token_ids_stand_where_vllm_has_them(client, engine):
    _, chat, _ = await post(client, CHAT, HELLO | IDS)
    assert chat["prompt_token_ids"] == await engine.tokenize(HELLO["messages"])
    assert engine.detokenize(chat["choices"][0]["token_ids"]) == chat["choices"][0]["message"]["content"]
    first, *chunks = await stream(client, CHAT, HELLO | IDS)
    assert (first["prompt_token_ids"], ids_of([first])) == (chat["prompt_token_ids"], [])
    assert ids_of(chunks) == chat["choices"][0]["token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks)
    prompts = PROMPT | {"prompt": ["hello", "you"], "n": 2}
    _, plain, _ = await post(client, COMPLETE, prompts | IDS)
    wanted = [await engine.tokenize(prompt) for prompt in ("hello", "hello", "you", "you")]
    assert [choice["prompt_token_ids"] for choice in plain["choices"]] == wanted
    chunks = [chunk["choices"][0] for chunk in await stream(client, COMPLETE, prompts | IDS)]
    for index, choice in enumerate(plain["choices"]):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert [chunk["prompt_token_ids"] for chunk in mine if "prompt_token_ids" in chunk] == [wanted[index]]
        assert "prompt_token_ids" in mine[0]
        assert [id for chunk in mine for id in chunk.get("token_ids", [])] == choice["token_ids"]


async def test_answers_have_no_token_ids_unless_they_are_asked_for(client):
    for path, body in ((CHAT, HELLO), (COMPLETE, PROMPT)):
        for wish in ({}, {"return_token_ids": False}):
            _, answer, _ = await post(client, path, body | wish)
            assert "token_ids" not in str([answer, await stream(client, path, body | wish)])
    for path, body in ((RESPONSES, {"input": "hello"}), (MESSAGES, {"messages": HELLO["messages"], "max_tokens": 8})):
        status, answer, _ = await post(client, path, body | IDS)
        assert (status, answer["error"]["param"]) == (400, "return_token_ids")


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO | {"logprobs": True}), (COMPLETE, PROMPT | {"logprobs": 0})])
async def test_a_stream_that_broke_goes_on_behind_any_chunk(client, path, body):
    whole = await stream(client, path, body | IDS)
    ids, cut = ids_of(whole), 0
    for place, chunk in enumerate(whole):
        if cut == len(ids_of(whole[: place + 1])):
            continue
        cut = len(ids_of(whole[: place + 1]))
        again = body | IDS | {"resume_token_ids": ids[:cut]}
        rest = await stream(client, path, again)
        assert (text_of(rest), ids_of(rest)) == (text_of(whole[place + 1 :]), ids[cut:])
        assert rest[-1]["choices"][0]["finish_reason"] == whole[-1]["choices"][0]["finish_reason"]
        assert rest[-1]["dilaserve"]["resumed_tokens"] == cut
        _, answer, _ = await post(client, path, again)
        assert text_of([answer]) or path == CHAT or cut == len(ids)
        assert answer["usage"]["completion_tokens"] == len(ids) - cut
        assert answer["choices"][0]["token_ids"] == ids[cut:]
        assert chunk["choices"][0]["finish_reason"] is None


async def test_log_probabilities_and_their_places_in_the_text_are_of_what_is_new(client, engine):
    """Also behind part of a character, and behind what may have been the beginning of a stop string."""
    ask = PROMPT | IDS | {"logprobs": 0, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    _, whole, _ = await post(client, COMPLETE, ask)
    text, ids, listed = (whole["choices"][0][name] for name in ("text", "token_ids", "logprobs"))
    for stop in ([], [text[8:10] + "never"]):
        for cut in range(1, len(ids)):
            _, rest, _ = await post(client, COMPLETE, ask | {"stop": stop, "resume_token_ids": ids[:cut]})
            new, behind = rest["choices"][0]["text"], rest["choices"][0]["logprobs"]
            assert text.endswith(new)
            assert behind["tokens"] == listed["tokens"][cut:]
            assert behind["token_logprobs"] == pytest.approx(listed["token_logprobs"][cut:], abs=1e-3)
            moved = [place + len(new) - len(text) for place in listed["text_offset"][cut:]]
            assert behind["text_offset"] == moved


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        (RESPONSES, {"input": "hello", "max_output_tokens": 24, "block_length": 8}, "output_tokens"),
        (MESSAGES, {"messages": HELLO["messages"], "max_tokens": 24, "block_length": 8}, "output_tokens"),
    ],
)
async def test_the_other_routes_go_on_too(client, engine, path, body, tokens):
    prompt = HELLO["messages"]
    ids = (await engine.generate(prompt, Options(max_tokens=24, block_length=8))).token_ids
    status, answer, _ = await post(client, path, body | {"resume_token_ids": ids[:10]})
    assert status == 200, answer
    part = (answer.get("output") or [answer])[0]["content"][0]
    assert part["text"] == engine.detokenize(ids)[len(engine.detokenize(ids[:10])) :] or "\ufffd" in part["text"]
    assert (answer["usage"][tokens], answer["dilaserve"]["resumed_tokens"]) == (14, 10)


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        (CHAT, {"n": 2}, "resume_token_ids"),
        (COMPLETE, {"prompt": ["a", "b"]}, "resume_token_ids"),
        (COMPLETE, {"echo": True}, "echo"),
        (COMPLETE, {"likelihood": "pseudo", "echo": True, "logprobs": 0, "max_tokens": 0}, "resume_token_ids"),
        (CHAT, {"resume_token_ids": [1e9]}, "resume_token_ids"),
        (CHAT, {"resume_token_ids": [10**9]}, "resume_token_ids"),
        (CHAT, {"resume_token_ids": "abc"}, "resume_token_ids"),
        (CHAT, {"resume_token_ids": [5] * 30}, "resume_token_ids"),
        (CHAT, {"slo": {"elapsed_ms": -1}}, "slo.elapsed_ms"),
        (CHAT, {"slo": {"elapsed_ms": 86_400_001}}, "slo.elapsed_ms"),
        (CHAT, {"slo": {"elapsed_ms": "x"}}, "slo.elapsed_ms"),
    ],
)
async def test_what_cannot_go_on_is_refused_by_name(client, path, more, param):
    base = HELLO if path == CHAT else {"prompt": "hello", "max_tokens": 8}
    if "max_tokens" in more:
        base = {"prompt": "hello"}
    status, answer, _ = await post(client, path, base | {"resume_token_ids": [5, 6]} | more)
    assert (status, answer["error"]["param"].partition("[")[0]) == (400, param), answer


async def test_a_deadline_counts_from_the_first_arrival(client):
    def body(**slo):
        return HELLO | {"slo": {"deadline_ms": 3_600_000} | slo}

    ago = time.time() - 600
    for ask, headers in (
        (body(elapsed_ms=600_000), {}),
        (body(), {HEADER: str(ago)}),
        (body(elapsed_ms=600_000), {HEADER: str(time.time())}),
    ):
        _, answer, _ = await post(client, CHAT, ask, **headers)
        about = answer["dilaserve"]
        assert 600 <= about["queued"] < 700
        assert about["deadline"] == pytest.approx(3600.0)
    _, answer, _ = await post(client, CHAT, body(), **{HEADER: str(time.time() + 600)})
    assert 0 <= answer["dilaserve"]["queued"] < 100
    _, answer, _ = await post(client, CHAT, body(elapsed_ms=3_700_000))
    assert answer["dilaserve"]["deadline_met"] is False
    status, answer, _ = await post(client, CHAT, body(elapsed_ms=3_700_000, on_miss="cancel_when_late"))
    assert status in (429, 504), answer


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "", "-1", "12"])
async def test_a_first_arrival_that_is_none_is_refused(client, value):
    status, answer, _ = await post(client, CHAT, HELLO, **{HEADER: value})
    assert (status, answer["error"]["param"]) == (400, HEADER)
