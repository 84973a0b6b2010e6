"""A panic in the tokenizers library fails one request and nothing else."""

import asyncio
import json

import pytest
import pytest_asyncio
from raw_http import COMPLETE, HELLO, LONG, answered, final, written
from tokenizers import Tokenizer, decoders, models

from dilaserve import Options
from dilaserve.errors import RequestFailed
from dilaserve.server.app import running
from dilaserve.tokenizer.panics import Panic, contained

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(engine):
    async with running(engine, engine.config) as address:
        yield address.removeprefix("http://").split(":")


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
    assert len(engine.consumer.free) == engine.table.rows
    assert final(await answered(address, written(COMPLETE, HELLO, "connection: close")))[0] == 200


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, ValueError])
async def test_only_panics_are_contained(kind):
    with pytest.raises(kind), contained():
        raise kind
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(Panic, match="out of range"), contained():
        raise panic("out of range")
