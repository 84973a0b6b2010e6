"""The most probable tokens of each position: against plain loops in float64, over HTTP, and where nobody asks."""

import asyncio

import pytest
import torch
from block_loops import even
from http_requests import CHAT, COMPLETE, HELLO, post, stream
from parity import best_of, same_tops
from reference_loops import Llada, transfer

from dilaserve import BadRequest, Options

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT, K = list(range(40, 60)), 5


def known(model, steps, block_length, total):
    """LLaDA's generate.py, with the best tokens of each position in the step that unmasks it."""
    x, tops = [*PROMPT, *[model.mask_id] * total], {}
    for start in range(len(PROMPT), len(x), block_length):
        for quota in even(block_length, steps * block_length // total):
            logits, before = model.forward(x)[0], list(x)
            transfer(logits[start:], x, start, start + block_length, len(PROMPT), model.mask_id, ("quota", quota))
            tops |= {i: best_of(logits[i], model.mask_id) for i in range(len(x)) if x[i] != before[i]}
    return x[len(PROMPT) :], [tops[i] for i in range(len(PROMPT), len(x))]


async def test_the_answer_lists_what_a_plain_loop_finds_most_probable(engine, random_model):
    tokens, tops = known(Llada(random_model), 12, 8, 24)
    options = Options(max_tokens=24, block_length=8, num_denoising_steps=12, cache="none", top_logprobs=K)
    alone = await engine.generate(PROMPT, options)
    assert list(alone.token_ids) == tokens
    assert same_tops(alone.top_logprobs, tops)
    fewer = Options(max_tokens=24, block_length=8, num_denoising_steps=12, cache="none", top_logprobs=2)
    nobody = Options(max_tokens=24, block_length=8, num_denoising_steps=12, cache="none")
    many = await asyncio.gather(*(engine.generate(PROMPT, one) for one in (options, fewer, nobody)))
    assert [len(one.token_ids) for one in many] == [24, 24, 24]
    assert (same_tops(many[0].top_logprobs, tops), many[2].top_logprobs) == (True, ())
    assert same_tops(many[1].top_logprobs, [top[:2] for top in tops])


async def test_tokens_of_an_answer_have_the_confidence_that_heads_their_list(engine):
    for cache in ("prefix", "dual"):
        answer = await engine.generate(PROMPT, Options(max_tokens=32, cache=cache, top_logprobs=1))
        assert [top[0].token_id for top in answer.top_logprobs] == list(answer.token_ids)
        values = torch.tensor([top[0].logprob for top in answer.top_logprobs]).exp()
        assert torch.allclose(values, torch.tensor(answer.confidences), atol=1e-5)


async def test_chat_and_completions_list_the_most_probable_tokens(client, engine):
    _, plain, _ = await post(client, CHAT, HELLO | {"logprobs": True})
    wish = HELLO | {"logprobs": True, "top_logprobs": 3}
    _, body, _ = await post(client, CHAT, wish)
    found = body["choices"][0]["logprobs"]["content"]
    assert [one | {"top_logprobs": []} for one in found] == plain["choices"][0]["logprobs"]["content"]
    for one in found:
        best, *others = one["top_logprobs"]
        assert {**best, "top_logprobs": one["top_logprobs"]} == one
        assert [len(others), *(other["logprob"] <= best["logprob"] for other in others)] == [2, True, True]
    chunks = await stream(client, CHAT, wish)
    pieces = [chunk["choices"][0].get("logprobs") or {} for chunk in chunks]
    assert [one for piece in pieces for one in piece.get("content", [])] == found

    _, body, _ = await post(client, COMPLETE, {"prompt": "hello", "max_tokens": 8, "logprobs": 2})
    found = body["choices"][0]["logprobs"]
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())


async def test_a_token_that_was_drawn_stands_beside_the_most_probable_ones(client):
    wish = {"prompt": "hello", "max_tokens": 200, "logprobs": 1, "temperature": 2.0, "seed": 3, "ignore_eos": True}
    found = (await post(client, COMPLETE, wish))[1]["choices"][0]["logprobs"]
    rows = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
    assert all(top[token] >= value for token, value, top in rows)
    assert any(len(top) == 2 for _, _, top in rows)


@pytest.mark.parametrize(
    ("path", "wish", "param"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (COMPLETE, {"prompt": "a", "logprobs": 6}, "logprobs"),
        (COMPLETE, {"prompt": "a", "logprobs": -1}, "logprobs"),
        (COMPLETE, {"prompt": "a", "top_logprobs": 1}, "top_logprobs"),
    ],
)
async def test_lists_that_cannot_be_given_are_refused_by_name(client, path, wish, param):
    status, body, _ = await post(client, path, (HELLO if path == CHAT else {}) | wish)
    assert (status, body["error"]["param"]) == (400, param)


async def test_the_python_api_refuses_more_than_it_keeps(engine):
    with pytest.raises(BadRequest, match="top_logprobs must lie between 0 and 5, not 9"):
        await engine.generate("hello", Options(top_logprobs=9))
