"""GET /v1/quote: what it says, what it refuses, and whose key it wants."""

import aiohttp
import pytest
from http_requests import CHAT, HELLO, post
from hypothesis import given
from hypothesis import strategies as st

from dilaserve import BadRequest, Config
from dilaserve.server import quote_api
from dilaserve.server.app import running

QUOTE = "/v1/quote"
ASK = {"prompt_tokens": "6", "max_tokens": "24", "block_length": "8"}


async def quoted(client, **query):
    async with client.get(QUOTE, params={name.rstrip("_"): value for name, value in query.items()}) as response:
        return response.status, await response.json()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_quote_is_of_now_and_submits_nothing(client, engine):
    received = engine.scheduler.totals.received
    status, answer = await quoted(client, **ASK)
    assert (status, answer["admitted"], answer["met"], answer["deadline_ms"]) == (200, True, None, None)
    assert (answer["running"], answer["waiting"]) == (0, 0)
    assert engine.scheduler.totals.received == received
    assert len(engine.consumer.free) == engine.table.rows
    _, answer = await quoted(client, **ASK, deadline_ms="60000", elapsed_ms="10000", priority="1", on_miss="reject")
    assert answer["admitted"]
    assert 49_000 < answer["deadline_ms"] <= 50_000
    _, answer = await quoted(client, **ASK, class_="slow")
    assert answer["deadline_ms"] > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_once_step_costs_are_known_a_quote_says_what_on_miss_reject_does(client, engine):
    """Requests are sent until the server knows what its steps cost."""
    for _ in range(200):
        if engine.scheduler.deadlines.admits:
            break
        await post(client, CHAT, HELLO | {"slo": {"deadline_ms": 60_000}})
    assert engine.scheduler.deadlines.admits
    for deadline, met in ((60_000, True), (0.001, False)):
        status, answer = await quoted(client, **ASK, deadline_ms=str(deadline), on_miss="reject")
        assert (status, answer["met"], answer["admitted"], answer["never_feasible"]) == (200, met, met, not met)
        status, _, _ = await post(client, CHAT, HELLO | {"slo": {"deadline_ms": deadline, "on_miss": "reject"}})
        assert status == (200 if met else 429)
    _, answer = await quoted(client, **ASK, deadline_ms="60000")
    assert answer["slack_ms"] + answer["finish_ms"] == pytest.approx(answer["deadline_ms"], abs=0.01)
    assert answer["confidence_threshold"] == engine.model.traits.confidence_threshold
    _, answer = await quoted(client, **ASK)
    assert (answer["wait_ms"], answer["finish_ms"] > 0) == (0.0, True)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt_tokens": "many"}, "prompt_tokens"),
        ({"prompt_tokens": "0"}, "prompt_tokens"),
        ({"prompt_tokens": "-5"}, "prompt_tokens"),
        ({"prompt_tokens": "1.5"}, "prompt_tokens"),
        ({"prompt_tokens": "100000"}, "prompt_tokens"),
        ({"max_tokens": "0"}, "max_tokens"),
        ({"max_tokens": "100000"}, "max_tokens"),
        ({"deadline_ms": "soon"}, "deadline_ms"),
        ({"deadline_ms": "nan"}, "deadline_ms"),
        ({"deadline_ms": "-1"}, "deadline_ms"),
        ({"elapsed_ms": "1e12"}, "elapsed_ms"),
        ({"class_": "unknown"}, "class"),
        ({"class_": "slow", "deadline_ms": "5"}, "class"),
        ({"priority": "99"}, "priority"),
        ({"on_miss": "shrug"}, "on_miss"),
        ({"decode": "steps"}, "num_denoising_steps"),
        ({"deadline": "5"}, "deadline"),
    ],
)
async def test_parameters_without_a_meaning_are_refused_by_name(client, more, param):
    status, answer = await quoted(client, **ASK | more)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert param in answer["error"]["message"] or param in ("prompt_tokens", "class")


@pytest.mark.asyncio(loop_scope="module")
async def test_the_prompts_length_is_needed_and_the_model_must_be_known(client):
    status, answer = await quoted(client)
    assert (status, answer["error"]["param"]) == (400, "prompt_tokens")
    status, answer = await quoted(client, prompt_tokens="5", model="other")
    assert (status, answer["error"]["param"]) == (404, "model")


@given(st.dictionaries(st.sampled_from([*ASK, "deadline_ms", "class", "on_miss", "x"]), st.text(max_size=6)))
def test_any_query_is_read_or_refused(query):
    try:
        found = quote_api.asked(query)
    except BadRequest:
        return
    assert found.prompt_tokens == int(query["prompt_tokens"])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_quote_wants_the_key_and_is_of_the_keys_tenant(engine, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text('[[tenant]]\nname = "ann"\nkey = "key-of-ann"\npriority = 1\nmax_priority = 2\n')
    async with (
        running(engine, Config.of(port=0, api_key_file=str(file))) as address,
        aiohttp.ClientSession(address) as client,
    ):
        async with client.get(QUOTE, params=ASK) as response:
            assert response.status == 401
        for priority, status in (("2", 200), ("3", 400)):
            key = {"authorization": "Bearer key-of-ann"}
            async with client.get(QUOTE, params=ASK | {"priority": priority}, headers=key) as response:
                assert response.status == status
