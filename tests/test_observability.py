"""What operators see: metrics, vLLM's names for them, the log of requests, and the files that read metrics."""

import json
import logging
import re
from pathlib import Path

import aiohttp
import pytest
import yaml
from http_requests import CHAT, HELLO, post

from dilaserve import Config
from dilaserve.engine.observer import Ended
from dilaserve.server.app import running
from dilaserve.server.lateness import cause
from dilaserve.server.metrics import MOST_TENANTS, drops
from dilaserve.server.request_log import fields, pairs
from dilaserve.system import logs
from dilaserve.types import Decoding, Request, Slo, Usage

pytestmark = pytest.mark.asyncio(loop_scope="module")
MONITORING = Path(__file__).parent.parent / "bin" / "monitoring"
TIMED = HELLO | {"slo": {"class": "slow"}}
REQUEST = Request(
    id="one",
    row=0,
    generation=1,
    prompt_tokens=8,
    canvas_tokens=40,
    max_tokens=32,
    arrived_at=100.0,
    decoding=Decoding(),
    slo=Slo(seconds=1.0, tenant="a tenant", name="chat"),
)


async def scraped(client):
    """The samples of /metrics by name with labels."""
    async with client.get("/metrics") as response:
        text = await response.text()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def test_metrics_count_a_request_where_dashboards_look_for_it(engine):
    config = Config.of(port=0, vllm_metrics="on")
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        for body in (TIMED, HELLO):
            assert (await post(client, CHAT, body))[0] == 200
        assert (await post(client, CHAT, {"messages": 1}))[0] == 400
        assert (await post(client, CHAT, HELLO | {"slo": {"deadline_ms": 0.001, "on_miss": "reject"}}))[0] == 429
        async with client.get("/nothing/here") as response:
            assert response.status == 404
        found = await scraped(client)
    assert found[f'dilaserve_http_requests_total{{method="POST",route="{CHAT}",status="200"}}'] == 2
    assert found[f'dilaserve_http_requests_total{{method="POST",route="{CHAT}",status="400"}}'] == 1
    assert found['dilaserve_http_requests_total{method="GET",route="unknown",status="404"}'] == 1
    assert found['dilaserve_deadlines_by_class_total{class="slow",fate="met"}'] == 1
    causes = {name: value for name, value in found.items() if name.startswith("dilaserve_deadline_causes_total")}
    assert len(causes) == 5
    assert {name for name, value in causes.items() if value} == {'dilaserve_deadline_causes_total{cause="too_short"}'}
    assert found["dilaserve_generation_tokens_total"] == found["dilaserve_request_generation_tokens_sum"] == 48
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        count = found[f"dilaserve_{name}_count"]
        assert count == found[f'vllm:{name}_count{{model_name="{engine.model.name}"}}'] == 2
    assert found["dilaserve_deadline_slack_seconds_count"] == 1
    assert found["dilaserve_request_steps_sum"] <= found["dilaserve_step_rows_total"]
    assert found[f'vllm:num_requests_running{{model_name="{engine.model.name}"}}'] == 0
    page, pages = found["dilaserve_kv_cache_page_tokens"], found["dilaserve_kv_cache_pages"]
    assert page * pages == found['dilaserve_kv_cache_tokens{state="capacity"}'] > 0
    labels = f'block_size="{page:.0f}",model_name="{engine.model.name}",num_gpu_blocks="{pages:.0f}"'
    assert found[f"vllm:cache_config_info{{{labels}}}"] == 1
    assert found[f'vllm:request_success_total{{finished_reason="length",model_name="{engine.model.name}"}}'] == 2
    assert sum(value for name, value in found.items() if "steps_by_kind" in name) == found["dilaserve_steps_total"]
    assert found["process_resident_memory_bytes"] > 0


async def test_a_closed_server_no_longer_watches_its_engine(engine):
    before = len(engine.observers)
    async with running(engine, Config.of(port=0)):
        assert len(engine.observers) == before + 3
    assert len(engine.observers) == before


async def test_each_request_has_a_line_with_its_id_in_the_log(client, caplog):
    caplog.set_level(logging.INFO, "dilaserve.requests")
    await post(client, CHAT, TIMED | {"n": 2, "user": "ann"}, **{"x-request-id": "seen-1"})
    lines = [record for record in caplog.records if record.name == "dilaserve.requests"]
    assert [record.deadline_fate for record in lines] == ["met", "met"]
    assert all(record.request_id.startswith("seen-1-") for record in lines)
    assert all("tenant=ann class=slow" in record.getMessage() for record in lines)
    assert all(record.queued + record.served > 0 and record.stepping > 0 and record.alone > 0 for record in lines)


async def test_the_log_says_why_a_request_was_refused(client, caplog):
    caplog.set_level(logging.INFO, "dilaserve.server.edge")
    _, body, _ = await post(client, CHAT, HELLO | {"n": 0})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dilaserve.server.edge"]
    assert line.startswith(f"POST '{CHAT}' answered with 400 after ")
    assert line.endswith(f" s: {body['error']['message']}")


async def test_an_observer_that_raises_harms_no_request(client, engine, caplog):
    class Broken:
        def emitted(self, *_):
            raise ValueError("broken")

        ended = emitted

    engine.observers.append(broken := Broken())
    try:
        assert (await post(client, CHAT, HELLO))[0] == 200
    finally:
        engine.observers.remove(broken)
    assert "could not be reported" in caplog.text


def ended(**usage):
    known = {"steps": 4, "refreshes": 1, "queued": 0.1, "served": 0.4, "mean_confidence": 0.9, "deadline": 1.0}
    known |= {"alone": 0.3, "stepping": 0.35, "deadline_met": known["queued"] + usage.get("served", 0.4) <= 1.0}
    return Ended(
        request=REQUEST,
        fate="answered",
        reason="stop",
        usage=Usage(**known | usage),
        tokens=12,
        first_at=100.3,
        last_at=100.5,
        ended_at=100.5,
    )


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        ({"queued": 2.0, "served": 0.5}, "waited for a row"),
        ({"served": 3.0, "stepping": 2.9}, "shared"),
        ({"served": 3.0, "stepping": 0.3}, "between steps"),
        ({"served": 3.0, "stepping": 0.3, "restarts": 2}, "lost its K/V 2 times"),
        ({"alone": 1.5, "served": 1.6}, "shorter than the request takes alone"),
    ],
)
async def test_the_log_says_why_a_request_was_late(usage, words):
    late = ended(**usage, deadline_met=False)
    assert words in fields(late)["cause"] == cause(late.usage)
    assert late.slack < 0


async def test_a_request_in_time_has_no_cause_and_quoted_fields_stay_on_one_line():
    known = fields(ended())
    assert "cause" not in known
    assert (known["slack"], known["first_token"]) == (0.5, 0.3)
    assert "tenant='a tenant' class=chat deadline_fate=met" in pairs(known)


async def test_log_lines_carry_the_request_at_hand():
    record = logging.LogRecord("dilaserve.x", logging.INFO, "", 1, "something %s", ("happened",), None)
    logs.REQUEST.set("r1")
    assert logs.RequestId().filter(record)
    logs.REQUEST.set("")
    assert logs.formatter("text").format(record).endswith("INFO dilaserve.x: something happened [request r1]")
    known = json.loads(logs.formatter("json").format(record))
    assert (known["level"], known["logger"], known["message"]) == ("INFO", "dilaserve.x", "something happened")
    assert known["request_id"] == "r1"


async def test_few_tenants_have_a_label_of_their_own():
    banks = {f"t{i}": (float(i), 2.0 * i) for i in range(1, 41)}
    found = dict(drops(banks))
    assert len(found) == MOST_TENANTS + 1
    assert set(found.values()) == {0.5}
    assert ("t40" in found, "t1" in found, "other" in found) == (True, False, True)


async def test_dashboard_and_alerts_name_metrics_that_exist(engine):
    config = Config.of(port=0)
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        await post(client, CHAT, TIMED)
        known = {re.sub(r"\{.*", "", name) for name in await scraped(client)}
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    rules = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    assert (len(targets) > 20, len(rules) > 5) == (True, True)
    for expression in (*targets, *rules):
        names = set(re.findall(r"\b(?:dilaserve|process)_\w+", expression))
        assert names, expression
        assert names <= known, (expression, names - known)
