"""bin/deploy/envoy.yaml: it fits the server, and Envoy itself does with two servers what it promises."""

import asyncio
import contextlib
import json
import re
import socket
import time

import aiohttp
import envoy_process
import pytest
import yaml
from envoy_process import envoy, parts
from forked_python import Python
from http_requests import CHAT, COMPLETE, HELLO, post

from dilaserve import Config, Engine
from dilaserve.server import app, edge, first_arrival, routes, sse
from dilaserve.server.app import running
from dilaserve.server.gateway_headers import FAIRNESS_ID

with_envoy = pytest.mark.skipif(envoy_process.ENVOY is None, reason=envoy_process.MISSING)
LONG = {"prompt": "hello", "max_tokens": 240, "block_length": 1, "ignore_eos": True}
ID = "3d1c1c62-5a1b-1e0f-9b0e-000000000001"  # whose 15th character Envoy changes where it notes how it is traced


def seconds(text):
    return float(re.fullmatch(r"([\d.]+)s", text)[1])


def test_the_file_fits_the_server():
    manager, route, cluster = parts(envoy_process.settings())
    ready = {path for method, path, handler in routes.ROUTES if handler is routes.ready}
    assert {check["http_health_check"]["path"] for check in cluster["health_checks"]} == ready
    refused = {one["match"]["path"] for one in manager["route_config"]["virtual_hosts"][0]["routes"][:-1]}
    assert refused <= {path for _, path, _ in routes.ROUTES}
    config = Config()
    (host,) = manager["route_config"]["virtual_hosts"]
    assert host["request_body_buffer_limit"] == config.server.max_body_bytes
    places = cluster["circuit_breakers"]["thresholds"][0]
    assert places["max_requests"] >= 2 * config.scheduler.max_queue
    assert places["max_connections"] >= places["max_requests"]
    assert {one["endpoint"]["address"]["socket_address"]["port_value"] for one in endpoints(cluster)} == {
        config.server.port
    }
    assert route["request_headers_to_add"][0]["header"]["key"] == first_arrival.HEADER


def test_its_timeouts_fit_streams_and_kept_connections():
    _, route, cluster = parts(envoy_process.settings())
    (protocol,) = cluster["typed_extension_protocol_options"].values()
    assert seconds(route["route"]["timeout"]) == 0.0
    assert seconds(route["route"]["idle_timeout"]) > 2 * sse.PING_AFTER
    assert seconds(protocol["common_http_protocol_options"]["idle_timeout"]) < app.IDLE_WITHIN


def test_it_retries_what_another_server_may_take_and_nothing_else():
    _, route, _ = parts(envoy_process.settings())
    policy = route["route"]["retry_policy"]
    assert policy["retriable_status_codes"] == [503]
    assert not {"5xx", "gateway-error", "retriable-4xx", "envoy-ratelimited"} & set(policy["retry_on"].split(","))


def endpoints(cluster):
    return [one for group in cluster["load_assignment"]["endpoints"] for one in group["lb_endpoints"]]


def unwatched(found):
    """Envoy learns nothing of a server's state after the start, so that only retries help."""
    parts(found)[2]["health_checks"][0] |= {"interval": "600s", "no_traffic_interval": "600s"}


@contextlib.asynccontextmanager
async def two_engines(directory, **settings):
    """Engines of this process on ports of their own, with their addresses."""
    async with contextlib.AsyncExitStack() as stack:
        engines, addresses = [], []
        for _ in range(2):
            config = Config.of(model=str(directory), devices="cpu", port=0, **settings)
            engines.append(await stack.enter_async_context(Engine(config)))
            addresses.append(await stack.enter_async_context(running(engines[-1], config)))
        yield engines, addresses


class Served:
    """A server process."""

    def __init__(self, process):
        self.process = process
        self.address = re.search(r"on (http://\S+)", process.stdout.readline())[1]

    async def runs(self):
        """Whether a request runs on it."""
        async with aiohttp.ClientSession(self.address) as client, client.get("/metrics") as response:
            return "dilaserve_requests_running 1.0" in await response.text()


@pytest.fixture
def two_processes(random_model):
    words = "-m", "dilaserve", "serve", "--model", random_model, "--port", "0", "--devices", "cpu"
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(2):
            process = Python(*words)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            servers.append(Served(process))
        yield servers


async def killed_under(servers, asked):
    """Kill the server that has the only request, before its answer."""
    while not asked.done():
        for server in servers:
            if await server.runs():
                server.process.kill()
                return
    raise AssertionError("the answer came too soon")


def named(found):
    """Answers say which server they come from."""
    unwatched(found)
    header = {"header": {"key": "x-server", "value": "%UPSTREAM_HOST%"}}
    parts(found)[1]["response_headers_to_add"] = [header]


@with_envoy
async def test_a_request_to_a_server_that_drains_is_answered_by_the_other(random_model, tmp_path):
    async with (
        two_engines(random_model) as (engines, addresses),
        envoy(tmp_path, addresses, unwatched) as gateway,
    ):
        for drained in engines:
            drained.draining = True
            answers = [await post(gateway.client, COMPLETE, {"prompt": "hello", "max_tokens": 8}) for _ in range(8)]
            assert {status for status, _, _ in answers} == {200}
            assert not any("connection" in headers for _, _, headers in answers)
            drained.draining = False
        assert await gateway.count("upstream_rq_retry") > 0
        assert await gateway.count("upstream_rq_retry_success") == await gateway.count("upstream_rq_retry")


@with_envoy
async def test_a_server_that_drains_is_asked_no_more_once_a_check_has_seen_it(random_model, tmp_path):
    async with two_engines(random_model) as (engines, addresses), envoy(tmp_path, addresses) as gateway:
        assert await gateway.count("membership_healthy") == 2
        engines[0].draining = True
        while await gateway.count("membership_healthy") == 2:
            continue
        before = await gateway.count("upstream_rq_retry")
        for _ in range(8):
            assert (await post(gateway.client, COMPLETE, {"prompt": "hello", "max_tokens": 8}))[0] == 200
        assert await gateway.count("upstream_rq_retry") == before
        engines[1].draining = True
        while await gateway.count("membership_healthy") == 1:
            continue
        status, body, headers = await post(gateway.client, COMPLETE, {"prompt": "hello"})
        assert (status, body["error"]["message"]) == (503, "the server is shutting down; try another")
        assert int(headers["retry-after"]) > 0


@with_envoy
async def test_a_429_goes_to_the_client_with_its_retry_after(random_model, tmp_path):
    """One request a minute at each of two servers: of three, one at least is too many where it goes."""
    keys = tmp_path / "keys.toml"
    keys.write_text('[[tenant]]\nname = "a"\nkey = "its-long-and-random-key"\nrequests_per_minute = 1\n')
    key = {"authorization": "Bearer its-long-and-random-key"}
    async with (
        two_engines(random_model, api_key_file=str(keys)) as (_, addresses),
        envoy(tmp_path, addresses, unwatched) as gateway,
    ):
        answers = [await post(gateway.client, CHAT, HELLO, **key) for _ in range(3)]
        full = [(body["error"]["type"], headers) for status, body, headers in answers if status == 429]
        assert {kind for kind, _ in full} == {"rate_limit_error"}
        assert all(int(headers["retry-after"]) > 0 for _, headers in full)
        assert await gateway.count("upstream_rq_retry") == 0
        assert await gateway.count("upstream_rq_total") == 3


def hashed(found):
    """The variant that README.md tells of: a tenant's requests go to one server while it has room."""
    named(found)
    text = (envoy_process.FILE.parent / "README.md").read_text()
    _, route, cluster = parts(found)
    for owner, name in ((cluster, "lb_policy"), (cluster, "common_lb_config"), (route["route"], "hash_policy")):
        (setting,) = re.findall(rf"`({name}: [^`]+)`", text)
        owner |= yaml.safe_load(setting)


@with_envoy
async def test_with_a_hash_a_tenant_stays_at_its_server_until_that_drains(random_model, tmp_path):
    async with two_engines(random_model) as (engines, addresses), envoy(tmp_path, addresses, hashed) as gateway:

        async def servers_of(tenant):
            header = {FAIRNESS_ID: tenant}
            answers = [
                await post(gateway.client, COMPLETE, {"prompt": "hi", "max_tokens": 4}, **header) for _ in "1234"
            ]
            assert {status for status, _, _ in answers} == {200}
            return {headers["x-server"] for _, _, headers in answers}

        homes = [await servers_of(f"tenant-{number}") for number in range(24)]
        assert {len(home) for home in homes} == {1}
        assert len(set().union(*homes)) == 2  # it hashes
        (home,) = homes[0]
        places = [address.removeprefix("http://") for address in addresses]
        engines[places.index(home)].draining = True
        assert await servers_of("tenant-0") == {*places} - {home}


@with_envoy
async def test_ids_stay_and_the_servers_learn_when_a_request_came(random_model, tmp_path, caplog, monkeypatch):
    seen = []

    async def answer(service, request, known=edge.answer):
        seen.append(request.headers)
        return await known(service, request)

    monkeypatch.setattr(edge, "answer", answer)
    async with two_engines(random_model) as (_, addresses), envoy(tmp_path, addresses, unwatched) as gateway:
        seen.clear()
        began = time.time()
        status, _, headers = await post(gateway.client, CHAT, HELLO, **{"x-request-id": ID, first_arrival.HEADER: "5"})
        assert (status, headers["x-request-id"]) == (200, ID)
        (sent,) = seen
        assert sent["x-request-id"] == ID
        assert began - 0.001 <= float(sent[first_arrival.HEADER]) <= time.time()
        made = (await post(gateway.client, CHAT, HELLO))[2]["x-request-id"]
        assert made == seen[-1]["x-request-id"] != ID
        for path in ("/metrics", "/v1/plan"):
            async with gateway.client.get(path) as response:
                assert response.status == 404
                assert json.loads(await response.text())["error"]["code"] == "gateway"


@with_envoy
async def test_an_answer_whose_server_dies_before_it_comes_from_the_other(two_processes, tmp_path):
    addresses = [server.address for server in two_processes]
    async with envoy(tmp_path, addresses, unwatched) as gateway:
        _, wanted, _ = await post(gateway.client, COMPLETE, LONG)
        asked = asyncio.create_task(post(gateway.client, COMPLETE, LONG))
        await killed_under(two_processes, asked)
        status, answer, _ = await asked
        assert (status, answer["choices"]) == (200, wanted["choices"])
        assert await gateway.count("upstream_rq_retry_success") == 1
        status, answer, _ = await post(gateway.client, COMPLETE, LONG)  # or it cannot connect, and asks the other
        assert (status, answer["choices"]) == (200, wanted["choices"])


@with_envoy
async def test_a_server_that_is_stopped_finishes_its_stream_while_the_other_takes_the_rest(two_processes, tmp_path):
    ask = LONG | {"return_token_ids": True}
    by_place = {server.address.removeprefix("http://"): server for server in two_processes}
    async with envoy(tmp_path, [server.address for server in two_processes], named) as gateway:
        _, whole, _ = await post(gateway.client, COMPLETE, ask)
        ids, others = [], set()
        async with gateway.client.post(COMPLETE, json=ask | {"stream": True}) as response:
            stopped = by_place[response.headers["x-server"]].process
            async for line in response.content:
                ids += ids_of(line)
                if ids and not others:
                    stopped.terminate()
                    answers = [
                        await post(gateway.client, COMPLETE, {"prompt": "hello", "max_tokens": 8}) for _ in "1234"
                    ]
                    others = {headers["x-server"] for status, _, headers in answers if status == 200}
        assert ids == whole["choices"][0]["token_ids"]
        assert stopped.wait(60) == 0
        assert others - {response.headers["x-server"]}
        status, _, headers = await post(gateway.client, COMPLETE, {"prompt": "hello", "max_tokens": 8})
        assert (status, {headers["x-server"]}) == (200, by_place.keys() - {response.headers["x-server"]})


@with_envoy
async def test_with_no_server_left_clients_read_an_error_of_the_gateway_that_says_when_to_come_back(tmp_path):
    with contextlib.ExitStack() as stack:
        unused = [stack.enter_context(socket.socket()) for _ in range(2)]  # bound, and nobody listens
        for one in unused:
            one.bind(("127.0.0.1", 0))
        places = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in unused]
        async with envoy(tmp_path, places, unwatched) as gateway:
            status, body, headers = await post(gateway.client, COMPLETE, {"prompt": "hello"})
    assert (status, body["error"]["code"], body["error"]["param"]) == (503, "gateway", None)
    assert body["error"]["message"].startswith("gateway: ")
    assert int(headers["retry-after"]) > 0


@with_envoy
async def test_a_stream_whose_server_dies_goes_on_at_the_other_with_the_same_tokens(two_processes, tmp_path):
    """The first byte has gone to the client, so that Envoy retries nothing."""
    ask = LONG | {"return_token_ids": True}
    async with envoy(tmp_path, [server.address for server in two_processes], named) as gateway:
        _, whole, _ = await post(gateway.client, COMPLETE, ask)
        ids = []
        with pytest.raises(aiohttp.ClientPayloadError):
            await cut(gateway.client, ask, ids, two_processes)
        assert 0 < len(ids) < 240
        assert await gateway.count("upstream_rq_retry") == 0
        _, rest, _ = await post(gateway.client, COMPLETE, ask | {"resume_token_ids": ids})
        assert ids + rest["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
        assert rest["dilaserve"]["resumed_tokens"] == len(ids)


async def cut(client, ask, ids, servers):
    """A stream whose server is killed when its first tokens have come; `ids` takes what comes."""
    by_place = {server.address.removeprefix("http://"): server for server in servers}
    async with client.post(COMPLETE, json=ask | {"stream": True}) as response:
        async for line in response.content:
            ids += ids_of(line)
            if ids and by_place:
                by_place.pop(response.headers["x-server"]).process.kill()
                by_place.clear()


def ids_of(line):
    if not line.startswith(b"data: {"):
        return []
    return [id for choice in json.loads(line[6:])["choices"] for id in choice.get("token_ids", [])]
