"""The second channel of streams: the open block after each step, beside the text that is final."""

import asyncio
from itertools import groupby, pairwise

import openai
import pytest
import pytest_asyncio
from http_requests import CHAT, COMPLETE, post, stream
from hypothesis import given
from hypothesis import strategies as st

from dilaserve import Config, Engine, Options
from dilaserve.engine.canvas import CONTEXT, pieces
from dilaserve.tokenizer.detokenizer import Detokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")
ASK = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 24, "block_length": 8}
WITH_CANVAS = {"stream_options": {"include_canvas": True}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine():
    async with Engine(Config.of(model="dilaserve-tiny", devices="cpu", port=0, max_choices=4)) as engine:
        yield engine


@pytest.fixture(scope="module")
def bundled(engine):
    """The text of the bundled model."""
    return engine.text


def canvases(chunks, index=0):
    """The canvases of one choice, from the stream's extension field."""
    mine = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
    return [chunk["dilaserve"]["canvas"] for chunk in mine if "canvas" in chunk.get("dilaserve", {})]


def text_of(chunks, index=0):
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
    return "".join(delta.get("content", "") for delta in deltas)


def blocks_of(found):
    return [list(block) for _, block in groupby(found, key=lambda canvas: canvas["block"])]


def shown(canvas):
    return "".join(token or "" for token in canvas["tokens"])


@pytest.mark.parametrize(
    "more", [{}, {"ignore_eos": True}, {"confidence_threshold": 0.3}, {"temperature": 1.0, "seed": 5}]
)
async def test_the_last_canvas_of_each_block_is_its_text_and_masks_only_shrink(client, more):
    chunks = await stream(client, CHAT, ASK | WITH_CANVAS | more)
    found, ends = canvases(chunks), chunks[-1]["dilaserve"]
    blocks = blocks_of(found)
    assert "".join(shown(block[-1]) for block in blocks) == text_of(chunks)
    for block in blocks:
        for before, after in pairwise(block):
            masks = [(was, now) for was, now in zip(before["masked"], after["masked"], strict=False)]
            assert all(was or not now for was, now in masks)
            assert sum(after["masked"]) < sum(before["masked"])
        assert [canvas["kind"] == "commit" for canvas in block] == [False] * (len(block) - 1) + [True]
        assert not any(block[-1]["masked"])
    steps = [canvas["step"] for canvas in found]
    assert steps == list(range(1, ends["steps"] + 1))
    assert sum(canvas["refresh"] for canvas in found) == ends["refreshes"]
    seconds = [ends["queued"], *(canvas["seconds"] for canvas in found)]
    assert seconds == sorted(seconds)
    for canvas in found:
        known = [
            None if masked else 0 < sure <= 1
            for masked, sure in zip(canvas["masked"], canvas["confidences"], strict=True)
        ]
        assert known == [None if token is None else True for token in canvas["tokens"]]
        assert canvas["threshold"] == more.get("confidence_threshold", 0.9)
    assert [block[0]["start"] for block in blocks] == [8 * place for place in range(len(blocks))]


async def test_a_canvas_has_no_text_of_its_own_and_changes_none(client):
    _, whole, _ = await post(client, CHAT, ASK)
    chunks = await stream(client, CHAT, ASK | WITH_CANVAS)
    beside = [chunk for chunk in chunks if "canvas" in chunk.get("dilaserve", {})]
    assert all(chunk["choices"] == [{"index": 0, "delta": {}, "finish_reason": None}] for chunk in beside)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert not canvases(await stream(client, CHAT, ASK))


async def test_each_choice_has_its_own_canvas(client):
    hot = ASK | WITH_CANVAS | {"n": 3, "seed": 7, "temperature": 1.0}
    chunks = await stream(client, CHAT, hot)
    for index in range(3):
        last = [block[-1] for block in blocks_of(canvases(chunks, index))]
        assert "".join(map(shown, last)) == text_of(chunks, index)


async def test_completions_have_a_canvas_and_answers_in_one_piece_have_none(client):
    asked = {"prompt": "17 + 25 =", "max_tokens": 8, "block_length": 8} | WITH_CANVAS
    chunks = await stream(client, COMPLETE, asked)
    found = canvases(chunks)
    assert shown(found[-1]) == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    status, body, _ = await post(client, COMPLETE, asked)
    assert (status, body["error"]["param"]) == (400, "stream_options")


async def test_openais_client_reads_a_stream_with_canvases(address):
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "dilaserve-tiny", "messages": ASK["messages"], "max_tokens": 24, "stream": True}
        plain = [chunk async for chunk in await client.chat.completions.create(**asked)]
        both = [chunk async for chunk in await client.chat.completions.create(**asked, **WITH_CANVAS)]
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in chunks) for chunks in (plain, both)]
    assert texts[0] == texts[1] != ""
    assert len(both) > len(plain)


async def test_a_reader_that_is_slow_sees_the_latest_canvas_of_each_block(engine):
    options = Options(max_tokens=24, block_length=8, ignore_eos=True, confidence_threshold=1.0, include_canvas=True)
    async with await engine.submit(ASK["messages"], options) as answer:
        await asyncio.wait_for(engine.idle.wait(), 60)
        chunks = [chunk async for chunk in answer]
    found = [chunk.canvas for chunk in chunks if chunk.canvas]
    assert [(canvas.block, canvas.kind, canvas.step) for canvas in found] == [
        (0, "commit", 8),
        (1, "commit", 16),
        (2, "commit", 24),
    ]
    assert "".join("".join(canvas.tokens) for canvas in found) == "".join(chunk.text for chunk in chunks)


async def test_an_answer_that_nobody_watches_takes_no_snapshots(engine):
    async with await engine.submit(ASK["messages"], Options(max_tokens=24)) as answer:
        await asyncio.wait_for(engine.idle.wait(), 60)
        assert not answer.snapshots
        assert not any([chunk.canvas async for chunk in answer])


@given(ids=st.lists(st.integers(0, 400), min_size=1, max_size=24), length=st.integers(2, 9))
async def test_pieces_of_blocks_make_the_text_of_all_tokens(bundled, ids, length):
    """Also where a character's bytes are tokens of two blocks."""
    whole = Detokenizer(bundled)
    said = "".join(whole.push([id]) for id in ids)
    parts = [
        pieces(ids[max(0, at - CONTEXT) : at], ids[at : at + length], bundled, -1) for at in range(0, len(ids), length)
    ]
    assert "".join(piece or "" for part in parts for piece in part) == said
