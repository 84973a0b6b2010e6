"""Headers that gateways of inference set: which deadline, class and tenant a request has by them."""

import pytest
from http_requests import CHAT, COMPLETE, HELLO, client_of, post, stream

from dilaserve.server.gateway_headers import FAIRNESS_ID, OBJECTIVE, TPOT, TTFT

pytestmark = pytest.mark.asyncio(loop_scope="module")
BOTH = {TTFT: "1000", TPOT: "20"}  # of HELLO's 24 tokens: 1000 + 23 * 20
APIS = {
    CHAT: HELLO,
    COMPLETE: {"prompt": "hello", "max_tokens": 24},
    "/v1/responses": {"input": "hello", "max_output_tokens": 24},
    "/v1/messages": {"messages": HELLO["messages"], "max_tokens": 24},
}


@pytest.mark.parametrize("path", APIS)
async def test_both_latencies_are_a_deadline_for_the_whole_answer(client, path):
    status, body, _ = await post(client, path, APIS[path], **BOTH)
    assert (status, body["dilaserve"]["deadline"]) == (200, 1.46)
    assert "warnings" not in body


async def test_an_answer_of_no_stated_length_has_the_time_of_the_default_length(client, engine):
    _, body, _ = await post(client, COMPLETE, {"prompt": "hello"}, **{TTFT: "1000", TPOT: "20"})
    assert body["dilaserve"]["deadline"] == 1.0 + 0.02 * (engine.config.decode.default_max_tokens - 1)


async def test_a_latency_alone_is_a_deadline_where_the_first_token_comes_with_the_last(client):
    _, body, _ = await post(client, CHAT, HELLO, **{TTFT: "50000"})
    assert (body["dilaserve"]["deadline"], "warnings" in body) == (50.0, False)
    _, body, _ = await post(client, CHAT, HELLO, **{TPOT: "20"})
    assert (body["dilaserve"]["deadline"], body["warnings"]) == (
        None,
        [f"{TPOT} was ignored: it makes a deadline only together with {TTFT}"],
    )
    async with client.post(CHAT, json=HELLO | {"stream": True}, headers={TTFT: "50000"}) as response:
        said = await response.text()
    assert f"{TTFT} was ignored: of a stream" in said


async def test_an_objective_is_a_class_where_there_is_one_of_its_name(client):
    _, body, _ = await post(client, CHAT, HELLO, **{OBJECTIVE: "slow"})
    assert (body["dilaserve"]["deadline_met"], "warnings" in body) == (True, False)
    for path, asked in APIS.items():
        _, body, _ = await post(client, path, asked, **{OBJECTIVE: "gold"})
        assert body["dilaserve"]["deadline"] is None
        assert body["warnings"] == [f"{OBJECTIVE} was ignored: 'gold' is no class here (--slo-class)"]


@pytest.mark.parametrize(
    ("body", "headers", "deadline"),
    [
        ({"slo": {"deadline_ms": 60_000}}, {"x-slo-deadline-ms": "50000", **BOTH, OBJECTIVE: "slow"}, 60.0),
        ({"slo": {"class": "none"}}, {"x-slo-deadline-ms": "50000", **BOTH, OBJECTIVE: "slow"}, None),
        ({}, {"x-slo-deadline-ms": "50000", **BOTH, OBJECTIVE: "slow"}, 50.0),
        ({}, {"x-slo-class": "none", **BOTH, OBJECTIVE: "slow"}, None),
        ({}, {**BOTH, OBJECTIVE: "none"}, 1.46),
        ({"slo": {"on_miss": "best_effort"}}, BOTH, 1.46),
    ],
)
async def test_the_body_goes_before_our_headers_and_those_before_gateways(client, body, headers, deadline):
    _, answer, _ = await post(client, CHAT, HELLO | body, **headers)
    assert answer["dilaserve"]["deadline"] == deadline


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({TTFT: "soon", TPOT: "20"}, TTFT),
        ({TTFT: "nan"}, TTFT),
        ({TTFT: "-inf"}, TTFT),
        ({TTFT: "0", TPOT: "20"}, TTFT),
        ({TTFT: "1000", TPOT: "-1"}, TPOT),
        ({TTFT: "1000", TPOT: ""}, TPOT),
        ({TPOT: "1e9"}, TPOT),
        ({TTFT: "1000", TPOT: "86400000"}, TPOT),  # more than a day for all tokens
        ({FAIRNESS_ID: "a" * 513}, FAIRNESS_ID),
    ],
)
async def test_nonsense_is_refused_by_the_name_of_the_header(client, path, headers, param):
    status, body, _ = await post(client, path, APIS[path], **headers)
    assert (status, body["error"]["param"]) == (400, param)
    assert param in body["error"]["message"]


async def test_a_fairness_id_is_the_tenant_of_a_request_that_has_none(random_model, tmp_path, caplog):
    """A named key's tenant goes before, as it does before `user`."""
    keys = tmp_path / "keys.toml"
    keys.write_text('[[tenant]]\nname = "search"\nkey = "its-long-and-random-key"\n')
    named = {"authorization": "Bearer its-long-and-random-key"}
    for settings, body, headers, tenant in (
        ({}, {}, {}, "team-a"),
        ({}, {"user": "someone"}, {}, "someone"),
        ({"api_key_file": str(keys)}, {}, named, "search"),
    ):
        async with client_of(random_model, log_level="info", **settings) as client:
            caplog.clear()
            with caplog.at_level("INFO"):
                assert (await post(client, CHAT, HELLO | body, **headers, **{FAIRNESS_ID: "team-a"}))[0] == 200
        assert f"tenant={tenant} " in caplog.text


async def test_a_stream_has_the_warnings_of_its_headers_in_its_last_chunk(client):
    client.headers[OBJECTIVE] = "gold"
    *_, last = await stream(client, CHAT, HELLO)
    assert last["warnings"] == [f"{OBJECTIVE} was ignored: 'gold' is no class here (--slo-class)"]
