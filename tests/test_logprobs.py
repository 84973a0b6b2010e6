"""Log probabilities over HTTP: values, offsets and bytes, whole and streamed."""

import checkpoints
import pytest
from http_requests import CHAT, COMPLETE, HELLO, post, stream

from dilaserve.server.responses import HeldBackTokens, ResponseFormat, Token

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    wish = {"prompt": ["hello", "you"], "max_tokens": 8, "block_length": 4, "logprobs": 0}
    _, body, _ = await post(client, COMPLETE, wish)
    chunks = await stream(client, COMPLETE, wish)
    for index in range(2):
        found = body["choices"][index]["logprobs"]
        assert found["text_offset"][0] == 0
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


async def test_the_log_probabilities_end_where_a_stop_string_has_cut_the_text(client):
    wish = {"prompt": "hello", "max_tokens": 24, "block_length": 4, "logprobs": 0}
    _, whole, _ = await post(client, COMPLETE, wish)
    text, probabilities = (whole["choices"][0][name] for name in ("text", "logprobs"))
    at = next(i for i in range(5, 20) if text[i : i + 6].isascii() and text.find(text[i : i + 6]) == i)
    for stop in (text[at : at + 6], "never so"):
        _, cut, _ = await post(client, COMPLETE, wish | {"stop": stop})
        found = cut["choices"][0]["logprobs"]
        count = len(found["tokens"])
        assert found == {name: values and values[:count] for name, values in probabilities.items()}
        assert (0 < count < 24, count == 24) == (stop in text, stop not in text)
        chunks = await stream(client, COMPLETE, wish | {"stop": stop})
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
async def test_a_token_is_reported_together_with_its_text(engine, pieces, told):
    form = HeldBackTokens(engine.text)
    shown = [form.shown([Token(id, 1.0) for id in engine.text.encode(ids)], text, ends) for ids, text, ends in pieces]
    found = [
        engine.text.tokenizer.decode([token.id for token in tokens], skip_special_tokens=False) for tokens in shown
    ]
    assert found == told
