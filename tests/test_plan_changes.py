"""Changes of plan in an engine with real workers, and over HTTP."""

import asyncio
import re
from pathlib import Path

import aiohttp
import forked_python
import msgspec
import pytest
import pytest_asyncio
from parity import answers, asked, expect, some_requests
from reference_loops import Llada
from worker_waits import until

from dilaserve import BadRequest, Config, ConfigError, Engine, Options
from dilaserve.engine.assembly import advised, first_plan, real
from dilaserve.plans import checked, counted, parsed, shrunk, spelled, uniform
from dilaserve.profile.profile_file import guessed
from dilaserve.server.app import running
from dilaserve.server.plan_api import shown
from dilaserve.types import Plan

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    settings = dict(devices="cpu,cpu,cpu,cpu", plan="2x1+1x2", port=0, admin_key="a", api_key="b")
    config = Config.of(model=str(random_model), **settings)
    async with Engine(config) as engine:
        yield engine


async def test_tokens_do_not_depend_on_the_degree(engine, random_model):
    requests = some_requests(15, seed=3)  # every cache kind under every rule
    for plan in ("4x1", "2x2", "1x4"):
        change = await engine.replan(plan)
        assert (spelled(engine.plan), change.after) == (plan, engine.plan)
        expect(Llada(random_model), requests, await answers(engine, requests, stagger=True))


async def test_sampled_tokens_and_confidences_do_not_depend_on_the_degree(engine):
    wishes = [
        (asked(**request)[0], Options(max_tokens=32, temperature=0.8, top_p=top_p, seed=i, ignore_eos=True))
        for i, request in enumerate(some_requests(10, seed=5))
        for top_p in (1.0, 0.9)
    ]
    found = []
    for plan in ("4x1", "2x2", "1x4"):
        await engine.replan(plan)
        found.append(await asyncio.gather(*(engine.generate(*wish) for wish in wishes)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one.token_ids == two.token_ids
            assert one.confidences == pytest.approx(two.confidences, rel=1e-3)


async def test_plans_change_under_load_and_no_process_and_no_token_with_them(engine):
    workers = {handle.process.pid for handle in engine.executor.workers.values()}
    requests = [request | {"cache": "none"} for request in some_requests(24, seed=12)]
    expected = [(await engine.generate(*asked(**request))).token_ids for request in requests[:8]]
    await engine.replan("4x1")
    before = engine.profile.changes
    load = [asyncio.create_task(engine.generate(*asked(**request))) for request in requests[:8] * 6]
    for plan in ("1x4", "4x1", "2x2", "1x2+2x1", "2x2") * 2:
        steps = engine.profile.steps + 2
        await until(lambda steps=steps: engine.profile.steps >= steps or all(task.done() for task in load))
        await engine.replan(plan, "a test")
    completions = await asyncio.gather(*load)
    assert [completion.token_ids for completion in completions] == expected * 6
    assert engine.profile.changes == before + 10
    assert any(change.pause is not None for change in list(engine.history)[-10:])
    assert all(change.reason == "a test" for change in list(engine.history)[-10:])
    assert {handle.process.pid for handle in engine.executor.workers.values()} == workers


async def test_a_change_leaves_the_instances_of_both_plans_alone(engine):
    await engine.replan("1x2+2x1")
    kept = {replica.instance.ranks: id for id, replica in engine.scheduler.placement.replicas.items()}
    await engine.replan("2x2")
    now = {replica.instance.ranks: id for id, replica in engine.scheduler.placement.replicas.items()}
    assert now[(0, 1)] == kept[(0, 1)]
    assert len(now) == 2


async def test_another_models_profile_is_taken_and_said_once(tmp_path, caplog):
    file = tmp_path / "profile.json"
    profile = guessed("somebody-else", "cpu")
    file.write_bytes(msgspec.json.encode(profile))
    config = Config.of(devices="cpu", profile=str(file))
    assert real(config, lambda device, done, total: None).laws == {1: profile.costs["cpu x1"]}
    assert caplog.messages == ["the profile was measured with 'somebody-else', and the model is 'dilaserve-tiny'"]
    caplog.clear()
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(profile, model="dilaserve-tiny")))
    real(config, lambda device, done, total: None)
    real(Config.of(devices="cpu", profile=str(file), served_model_name="another"), lambda device, done, total: None)
    assert caplog.messages == []


async def test_a_request_for_the_present_plan_changes_nothing(engine):
    await engine.replan("2x2")
    changes, history = engine.profile.changes, list(engine.history)
    again = await engine.replan("2x2", "again")
    assert (spelled(again.before), spelled(again.after), again.reason) == ("2x2", "2x2", "again")
    assert (engine.profile.changes, list(engine.history)) == (changes, history)
    await engine.replan("4x1")
    assert engine.profile.changes == changes + 1


async def test_the_plan_over_http(engine):
    async with running(engine, engine.config) as address, aiohttp.ClientSession(address) as client:

        async def post(body, key):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            async with client.post("/v1/plan", json=body, headers=headers) as response:
                return response.status, await response.json()

        assert (await post({"plan": "4x1"}, None))[0] == 401
        assert (await post({"plan": "4x1"}, "b"))[0] == 403
        for wrong in ("4x", "3x1", "1x3+1x1", "8x1", [[0, 1], [1, 2]], [[0, 1]]):
            status, answer = await post({"plan": wrong}, "a")
            assert (status, answer["error"]["param"]) == (400, "plan")
        status, answer = await post({"plan": [[2, 3], [0], [1]], "reason": "because"}, "a")
        assert (status, answer["plan"], answer["reason"]) == (200, "1x2+2x1", "because")
        async with client.get("/v1/plan", headers={"authorization": "Bearer b"}) as response:
            shown = await response.json()
        assert (shown["plan"], shown["wanted"], shown["degrees"]) == ("1x2+2x1", "1x2+2x1", [1, 2, 4])
        assert shown["groups"] == [[0], [1], [2, 3]]
        assert shown["history"][0]["reason"] == "because"
        status, answer = await post({"plan": "4x1", "reason": "two\n lines\x1b[31m\u2028red\u202e "}, "a")
        assert (status, answer["reason"]) == (200, "two lines [31m red")
        status, answer = await post({"plan": "1x2+2x1", "reason": "\n"}, "a")
        assert (status, answer["reason"]) == (200, "asked for over HTTP")
        async with client.get("/metrics") as response:
            assert 'dilaserve_plan_instances{degree="2"} 1.0' in await response.text()


async def test_where_there_is_no_planner_it_is_said_what_is_missing(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cure = "step costs are known at degree 1 alone of 1, 2, 4; .*`dilaserve calibrate --model .* --devices cpu,cpu,cpu"
    with pytest.raises(BadRequest, match=f"there is no planner here: {cure}"):
        await engine.replan("auto")
    assert "planner" not in engine.advice  # a plan was named
    assert re.match(cure, shown(engine)["no_planner"])
    parts = real(Config.of(devices="cpu,cpu"), lambda device, done, total: None)
    cure = "step costs are known at degree 1 alone of 1, 2; `dilaserve calibrate --devices cpu,cpu` measures the others"
    assert (parts.planner, parts.unplanned) == (None, cure)
    assert advised(None, cure) == f"no planner changes the plan: {cure}"
    assert advised("a note", cure) == f"a note; no planner changes the plan: {cure}"
    assert (advised("a note", None), advised(None, None)) == ("a note", None)
    alone = real(Config.of(devices="cpu"), lambda device, done, total: None)
    assert (alone.planner, alone.unplanned) == (None, None)


async def test_the_plan_cannot_be_changed_without_an_admin_key(engine):
    config = Config.of(port=0)
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        async with client.post("/v1/plan", json={"plan": "4x1"}) as response:
            assert response.status == 403
        async with client.get("/v1/plan") as response:
            assert response.status == 200


async def test_a_model_too_large_for_one_device_is_read_in_shards(random_model):
    small = dict(devices="cpu,cpu,cpu,cpu", weights_memory=1e-4, kv_cache_tokens=640)
    requests = some_requests(15, seed=8)
    async with Engine(Config.of(model=str(random_model), **small)) as engine:
        assert (engine.degrees, spelled(engine.plan)) == ((2, 4), "2x2")
        expect(Llada(random_model), requests, await answers(engine, requests))
        with pytest.raises(BadRequest, match="on 2, 4 devices together"):
            await engine.replan("4x1")
        await engine.replan("1x4")
        expect(Llada(random_model), requests, await answers(engine, requests))
    with pytest.raises(ConfigError, match="fit on 2 devices together and there are 1"):
        async with Engine(Config.of(model=str(random_model), devices="cpu", weights_memory=1e-4)):
            pass


@pytest.mark.parametrize("what", ["plans", "kills"])
async def test_a_short_soak(random_model, what):
    words = [what, "--seconds", "4", "--clients", "8", "--model", str(random_model)]
    bench = Path(__file__).parent.parent / "bench" / "soak.py"
    done = forked_python.run(bench, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all goals reached\n")


async def test_a_plan_is_parsed_and_spelled():
    assert parsed("2x1+1x2", 4, (1, 2, 4)) == Plan(((0, 1), (2,), (3,)))
    assert spelled(parsed("4x1 + 2x2", 8, (1, 2))) == "2x2+4x1" == counted({1: 4, 2: 2, 8: 0})
    assert spelled(Plan(())) == "none"
    assert uniform(5, 2) == Plan(((0, 1), (2, 3)))
    assert checked(Plan(((3, 2), (1, 0))), 4, (1, 2)) == Plan(((0, 1), (2, 3)))
    assert checked(uniform(5, 2), 5, (2, 4))  # a device that no group can take may be left
    with pytest.raises(BadRequest, match="2 parts"):
        checked(Plan(((0, 2), (1, 3))), 4, (2, 4))
    for wrong in ("", "x", "0x1", "2x3", "1x1", "9x9", "1x8"):
        with pytest.raises(BadRequest):
            parsed(wrong, 4, (1, 2, 4))
    with pytest.raises(ConfigError, match="--plan 3x2"):
        first_plan("3x2", 4, (1, 2, 4))
    with pytest.raises(ConfigError, match="--plan 1x2: there is one device"):
        first_plan("1x2", 1, (1,))
    assert first_plan("auto", 4, (2, 4)) == Plan(((0, 1), (2, 3)))


async def test_a_plan_shrinks_to_the_devices_that_are_alive():
    eight = Plan((tuple(range(8)),))
    assert shrunk(eight, range(8), (1, 2, 4, 8)) == eight
    assert shrunk(eight, set(range(8)) - {3}, (1, 2, 4, 8)) == Plan(((0, 1, 2, 4), (5, 6), (7,)))
    assert shrunk(eight, set(range(8)) - {3}, (2, 4, 8)) == Plan(((0, 1, 2, 5), (4, 7)))  # both halves of the weights
    assert shrunk(eight, {0, 2, 4, 6}, (2, 4, 8)) == Plan(())
    assert shrunk(eight, (), (1, 2)) == Plan(())
