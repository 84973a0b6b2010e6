"""The service as an ASGI application says what the aiohttp server says, and hears when clients leave; so does a door
before two nodes.
"""

import asyncio
import contextlib
import gzip
import json

import pytest
import pytest_asyncio
from asgi_client import Exchange, ask
from http_requests import CHAT, COMPLETE, EIGHT, HELLO
from worker_waits import until

from dilaserve import Config
from dilaserve.ray.cluster_backend import ClusterBackend
from dilaserve.ray.node import Node
from dilaserve.ray.resumed_stream import NodeLost
from dilaserve.server.asgi import AsgiApp
from dilaserve.server.backend import LocalBackend
from dilaserve.server.service import Service
from dilaserve.tokenizer.tokenizer import Text

pytestmark = pytest.mark.asyncio(loop_scope="module")
PSEUDO = {"likelihood": "pseudo"}
TEXT = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True, "logprobs": 2}
REQUESTS = {
    "health": ("GET", "/health", None),
    "ready": ("GET", "/ready", None),
    "head": ("HEAD", "/health", None),
    "models": ("GET", "/v1/models", None),
    "model": ("GET", "/v1/models/random", None),
    "unknown model": ("GET", "/v1/models/a%2Fb", None),
    "quote": ("GET", "/v1/quote?prompt_tokens=20&max_tokens=8", None),
    "no quote": ("GET", "/v1/quote?prompt_tokens=20&max_tokens=x", None),
    "page": ("GET", "/static/style.css", None),
    "since": ("GET", "/v1/stats?since=x", None),
    "chat": ("POST", CHAT, EIGHT),
    "stream": ("POST", CHAT, EIGHT | {"stream": True, "stream_options": {"include_usage": True}}),
    "completion": ("POST", COMPLETE, TEXT | {"n": 2, "echo": False}),
    "likelihood": (
        "POST",
        COMPLETE,
        {"prompt": "hello", "max_tokens": 0, "logprobs": 1, "echo": True, "likelihood": "pseudo"},
    ),
    "responses": ("POST", "/v1/responses", {"input": "hello", "max_output_tokens": 8}),
    "messages": ("POST", "/v1/messages", {"messages": HELLO["messages"], "max_tokens": 8, "stream": True}),
    "bad field": ("POST", CHAT, HELLO | {"temperature": 9}),
    "bad json": ("POST", CHAT, b"{"),
    "too large": ("POST", CHAT, HELLO | {"user": "x" * 100_001}),
    "tokenize": ("POST", "/tokenize", {"prompt": "hello"}),
    "detokenize": ("POST", "/detokenize", {"tokens": [104, 105]}),
    "no route": ("GET", "/nowhere", None),
    "no method": ("PUT", CHAT, None),
}


def steady(text):
    """Without what differs from answer to answer: names, instants, seconds."""
    lines = []
    for line in text.splitlines():
        head, _, data = line.rpartition("data: ") if line.startswith("data: ") else ("", "", line)
        with contextlib.suppress(ValueError):
            data = cleaned(json.loads(data))
        lines.append((head, data))
    return lines


def cleaned(value):
    if isinstance(value, dict):
        hidden = {"id", "created", "created_at", "completed_at", "dilaserve", "item_id", "request_id"}
        return {
            name: cleaned(one)
            for name, one in value.items()
            if name not in hidden or (name == "id" and one == "random")
        }
    return [cleaned(one) for one in value] if isinstance(value, list) else value


class HereNodes:
    """Nodes of this process. `lost`: after so many pieces each node's next answer is lost."""

    def __init__(self, nodes):
        self.nodes, self.turn, self.lost = nodes, 0, None

    async def answer(self, call):
        self.turn += 1
        lost, self.lost = self.lost, None
        async with contextlib.aclosing(self.nodes[self.turn % len(self.nodes)].answer(call)) as pieces:
            count = 0
            async for piece in pieces:
                if count == lost:
                    raise NodeLost("killed")
                count += 1
                yield piece

    async def estimate(self, ids, sampling, call):
        return await self.nodes[0].estimate(ids, sampling, call)

    async def all(self, method, *given):
        if method == "card":
            return [node.card() for node in self.nodes]
        return [await getattr(node, method)(*given) for node in self.nodes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local(engine):
    service = Service(LocalBackend(engine, engine.config), engine.config)
    yield AsgiApp(service)
    await service.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(random_model):
    settings = {"max_body_bytes": 100_000, "max_choices": 4, "slo_class": "slow=1000x,none=none"}
    config = Config.of(model=str(random_model), devices="cpu", **settings)
    nodes = [Node(name, config) for name in ("one", "two")]
    for node in nodes:
        await node.start()
    yield HereNodes(nodes)
    for node in nodes:
        await node.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(nodes, random_model):
    text = Text(random_model)
    text.load_template()
    node = nodes.nodes[0]
    service = Service(ClusterBackend(nodes, node.card(), node.config, text), node.config)
    yield AsgiApp(service)
    await service.close()


@pytest.mark.parametrize("name", REQUESTS)
async def test_asgi_and_the_door_say_what_the_server_says(client, local, door, name):
    method, url, body = REQUESTS[name]
    sent = {"data": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"} if body is not None else {}
    async with client.request(method, url, headers=headers, **sent) as response:
        expected = response.status, steady(await response.text())
        known = response.headers
    for app in (local, door):
        answer = await ask(app, method, url, body)
        assert (answer.status, steady(answer.body.decode())) == expected
        for header in ("content-type", "allow", "cache-control", "vary", "content-length"):
            if header != "content-length" or method == "HEAD":
                assert answer.headers.get(header) == known.get(header), header
        assert answer.headers["x-request-id"]


async def test_a_body_in_pieces_and_a_compressed_one_are_read(local):
    whole = await ask(local, "POST", CHAT, EIGHT)
    pieces = await ask(local, "POST", CHAT, EIGHT, pieces=7)
    packed = await ask(local, "POST", CHAT, gzip.compress(json.dumps(EIGHT).encode()), **{"content-encoding": "gzip"})
    assert whole.status == 200
    assert cleaned(pieces.json()) == cleaned(packed.json()) == cleaned(whole.json())


@pytest.mark.parametrize("after", [1, 2, None])
async def test_a_client_that_leaves_ends_its_request(local, engine, after, caplog):
    body = json.dumps(
        HELLO | {"max_tokens": 200, "num_denoising_steps": 200, "ignore_eos": True} | {"stream": bool(after)}
    )
    exchange = Exchange(local, "POST", CHAT, body.encode(), after=after)
    running = asyncio.create_task(exchange.run())
    await until(lambda: engine.streams or running.done())
    if after is None:
        exchange.leave()
    await running
    await until(lambda: not engine.streams)
    assert exchange.answer.status in ((200,) if after else (None,))
    assert b"[DONE]" not in exchange.answer.body


async def test_a_client_that_leaves_within_its_body_is_not_answered(local):
    exchange = Exchange(local, "POST", CHAT, json.dumps(HELLO).encode(), pieces=3)
    del exchange.messages[1:]
    exchange.leave()
    exchange.messages, exchange.gone = exchange.messages, exchange.gone
    with contextlib.suppress(ConnectionResetError):
        await exchange.run()
    assert exchange.answer.status is None


async def test_lifespan_is_answered():
    sent, coming = [], [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive():
        return coming.pop(0)

    async def send(message):
        sent.append(message["type"])

    class Closing:
        async def close(self):
            sent.append("closed")

    await AsgiApp(Closing())({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "closed", "lifespan.shutdown.complete"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", range(4))
async def test_the_door_goes_on_with_a_lost_nodes_answer(door, nodes, stream, after):
    asked = EIGHT | {"max_tokens": 24, "block_length": 8, "cache": "none", "stream": stream, "logprobs": True}
    expected = await ask(door, "POST", CHAT, asked)
    nodes.lost = after
    answer = await ask(door, "POST", CHAT, asked)
    assert nodes.lost is None
    assert spoken(answer, stream) == spoken(expected, stream)


def spoken(answer, stream):
    if not stream:
        return cleaned(answer.json())["choices"]
    events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    logprobs = [one for choice in choices for one in (choice.get("logprobs") or {}).get("content", [])]
    return "".join(choice["delta"].get("content", "") for choice in choices), logprobs, choices[-1]["finish_reason"]


async def test_the_door_tells_of_all_nodes(door):
    metrics = (await ask(door, "GET", "/metrics")).body.decode()
    assert 'dilaserve_ready{node="one"} 1.0' in metrics
    assert 'dilaserve_ready{node="two"} 1.0' in metrics
    assert 'dilaserve_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}' in metrics
    plans = (await ask(door, "GET", "/v1/plan")).json()
    assert sorted(plans["nodes"]) == ["one", "two"]
    stats = (await ask(door, "GET", "/v1/stats")).json()
    assert stats["plan"]["devices"] == ["one cpu", "two cpu"]
    assert stats["requests"]["received"] == sum(one["received"] for one in stats["nodes"].values())
