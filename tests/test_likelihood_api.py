"""/v1/completions with `likelihood`, as lm-eval asks for it and reads it, and what is refused."""

import pytest
from http_requests import COMPLETE, post

from dilaserve import Options
from dilaserve.engine.likelihood import MonteCarlo, Pseudo, estimate

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPTS = [[40, 7, 99, 181, 3, 3, 60], [12, 77, 140, 9]]
ASKED = {"echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
PSEUDO = ASKED | {"prompt": "hello you", "max_tokens": 0, "likelihood": "pseudo"}


def read_by_lm_eval(body, contexts):
    """(log likelihood, whether greedy) of each continuation, as LocalCompletionsAPI.parse_logprobs reads them."""
    found = []
    for choice, context in zip(sorted(body["choices"], key=lambda one: one["index"]), contexts, strict=True):
        values = choice["logprobs"]["token_logprobs"][context:-1]
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        found.append((sum(values), all(one == max(top.values()) for one, top in zip(values, tops, strict=True))))
    return found


async def test_lm_eval_reads_the_likelihoods_of_continuations(client, engine):
    """It cannot send the field, so it sends the header; and a token behind the prompt, which it does not read."""
    wish = ASKED | {"prompt": PROMPTS, "max_tokens": 1, "model": "random"}
    status, body, _ = await post(client, COMPLETE, wish, **{"x-likelihood": "pseudo"})
    assert status == 200, body
    known = [await estimate(engine, ids, Pseudo(seed=1234), Options(), f"known{len(ids)}") for ids in PROMPTS]
    read = read_by_lm_eval(body, (3, 2))
    for (value, greedy), one, ids, context in zip(read, known, PROMPTS, (3, 2), strict=True):
        assert value == pytest.approx(sum(one.logprobs[context:]), abs=1e-3)
        best = [top.token_id for top in one.best[context:]]
        assert greedy == (best == ids[context:])
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [8, 5]
    assert body["usage"]["prompt_tokens"] == 11
    assert body["usage"]["completion_tokens"] == 2


async def test_the_answer_says_how_its_estimate_was_made(client, engine):
    how = {"groups": 3, "rounds": 2, "start": 4}
    _, body, _ = await post(client, COMPLETE, PSEUDO | {"likelihood": how})
    (choice,) = body["choices"]
    ids = await engine.tokenize("hello you")
    known = await estimate(engine, ids, Pseudo(**how, seed=1234), Options(), "known")
    about = choice["likelihood"]
    assert about == {"kind": "pseudo", **how, "seed": 1234} | {
        "log_likelihood": pytest.approx(known.total, abs=1e-3),
        "standard_error": pytest.approx(known.standard_error, abs=1e-3),
    }
    assert (choice["text"], choice["finish_reason"]) == ("hello you", "length")
    found = choice["logprobs"]
    assert found["token_logprobs"][:4] == found["top_logprobs"][:4] == [None] * 4
    assert found["token_logprobs"][4:] == pytest.approx(known.logprobs[4:], abs=1e-3)
    for token, value, top in list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))[
        4:
    ]:
        assert top[token] >= value
    assert "".join(found["tokens"]) == "hello you"
    _, bare, _ = await post(client, COMPLETE, PSEUDO | {"likelihood": how, "logprobs": 0})
    assert bare["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_the_bound_is_asked_for_by_name_by_fields_or_by_the_header(client, engine):
    ids = await engine.tokenize("hello you")
    known = await estimate(engine, ids, MonteCarlo(samples=5, start=3, seed=1234), Options(), "known")
    wish = PSEUDO | {"likelihood": {"kind": "monte-carlo", "samples": 5, "start": 3}}
    _, body, _ = await post(client, COMPLETE, wish)
    assert body["choices"][0]["likelihood"] == {"kind": "monte-carlo", "samples": 5, "start": 3, "seed": 1234} | {
        "log_likelihood": pytest.approx(known.total, abs=1e-3),
        "standard_error": pytest.approx(known.standard_error, abs=1e-3),
    }
    assert body["choices"][0]["logprobs"]["token_logprobs"][3:] == pytest.approx(known.logprobs[3:], abs=1e-3)
    _, named, _ = await post(client, COMPLETE, PSEUDO | {"likelihood": "monte-carlo"})
    _, headed, _ = await post(client, COMPLETE, PSEUDO | {"likelihood": None}, **{"x-likelihood": "monte-carlo"})
    for one in (named, headed):
        assert one["choices"][0]["likelihood"]["samples"] == 128
    assert headed["choices"][0]["likelihood"] == pytest.approx(named["choices"][0]["likelihood"], abs=1e-3)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"likelihood": None, "max_tokens": 1}, "logprobs"),
        ({"likelihood": "exact"}, "likelihood"),
        ({"likelihood": {"groups": 0}}, "likelihood"),
        ({"likelihood": {"group": 2}}, "likelihood"),
        ({"likelihood": {"samples": 2}}, "likelihood"),
        ({"likelihood": {"kind": "monte-carlo", "groups": 2}}, "likelihood"),
        ({"likelihood": {"kind": "monte-carlo", "samples": 2000}}, "likelihood"),
        ({"echo": False}, "echo"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": None}, "logprobs"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"stop": "x"}, "stop"),
        ({"confidence_threshold": 0.5}, "confidence_threshold"),
        ({"slo": {"deadline_ms": 5}}, "slo"),
        ({"prompt": [5]}, "prompt"),
        ({"prompt": []}, "prompt"),
    ],
)
async def test_what_does_not_go_with_a_likelihood_is_refused_by_name(client, wish, param):
    status, body, _ = await post(client, COMPLETE, PSEUDO | wish)
    assert (status, body["error"]["param"]) == (400, param), body


async def test_a_likelihood_from_left_to_right_is_refused_with_the_reason(client):
    _, body, _ = await post(client, COMPLETE, ASKED | {"prompt": "hello", "max_tokens": 1})
    assert "has no left-to-right likelihood" in body["error"]["message"]
    status, body, _ = await post(client, COMPLETE, ASKED | {"prompt": "a"}, **{"x-likelihood": "exact"})
    assert (status, body["error"]["param"]) == (400, "x-likelihood")
