"""OpenTelemetry spans of requests, as a collector receives them."""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from http_requests import CHAT, HELLO, post
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dilaserve import Config
from dilaserve.server.app import running
from dilaserve.server.listening import bound, url

pytestmark = pytest.mark.asyncio(loop_scope="module")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def test_a_request_is_a_span_of_its_clients_trace_with_its_steps_below(engine):
    received = []

    async def collect(request):
        received.append(await request.read())
        return web.Response()

    collector = web.Application()
    collector.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(collector)
    await runner.setup()
    with bound("127.0.0.1", 0) as (one,):
        await web.SockSite(runner, one).start()
        config = Config.of(port=0, otlp_traces_endpoint=f"{url(one)}/v1/traces")
        async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
            body = HELLO | {"slo": {"deadline_ms": 60_000}, "user": "ann"}
            parent = f"00-{TRACE}-{PARENT}-01"
            assert (await post(client, CHAT, body, traceparent=parent))[0] == 200
            assert (await post(client, CHAT, body))[0] == 200
        await runner.cleanup()
    message = ExportTraceServiceRequest.FromString(b"".join(received))
    spans = [span for one in message.resource_spans for scope in one.scope_spans for span in scope.spans]
    mine = [span for span in spans if span.trace_id.hex() == TRACE]
    assert 0 < len(mine) < len(spans)
    (root,) = [span for span in mine if span.parent_span_id.hex() == PARENT]
    below = [span for span in mine if span is not root]
    assert {span.name for span in below} == {"queue", "refresh", "reuse", "stream"}
    assert all(span.parent_span_id == root.span_id for span in below)
    assert all(root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano for span in below)
    known = {one.key: one.value for one in root.attributes}
    assert known["gen_ai.usage.output_tokens"].int_value == 24
    assert (known["dilaserve.tenant"].string_value, known["dilaserve.deadline_fate"].string_value) == ("ann", "met")
    steps = sum(one.value.int_value for span in below for one in span.attributes if one.key == "dilaserve.steps")
    assert steps == known["dilaserve.steps"].int_value


async def test_a_collector_that_is_not_there_costs_no_request(engine, caplog):
    config = Config.of(port=0, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        assert (await asyncio.wait_for(post(client, CHAT, HELLO), 30))[0] == 200
