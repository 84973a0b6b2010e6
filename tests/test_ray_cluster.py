"""Many nodes on a real Ray: what a killed node, a rollout and a changing load do to answers. Needs the extra `ray`."""

import asyncio

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

from ray_cluster import answer, deploy, kill, nodes, pids, session, started, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPTS = [f"Reverse: word{i}" for i in range(16)]


@pytest.fixture(scope="module")
def address():
    with started() as address:
        yield address


async def test_a_killed_node_loses_no_stream_and_changes_no_token(address):
    await asyncio.to_thread(deploy, nodes=2)
    async with session(address) as client:
        expected = await asyncio.gather(*(answer(client, prompt) for prompt in PROMPTS))
        assert all(len(ids) == 96 for ids in expected)
        victim, other = pids("node")
        running = [asyncio.create_task(answer(client, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(1.0)
        assert not any(one.done() for one in running)
        kill(victim)
        assert await asyncio.gather(*running) == expected
        assert other in pids("node")

        async def both():
            return len(await nodes(client)) == 2

        await until(both, 60.0)
        assert victim not in pids("node")


async def test_a_client_that_leaves_frees_its_row_on_the_node(address):
    await asyncio.to_thread(deploy, nodes=2)
    async with session(address) as client:

        async def running():
            async with client.get("/v1/stats") as response:
                return (await response.json())["requests"]["running"]

        async def idle():
            return not await running()

        leaving = asyncio.create_task(answer(client, PROMPTS[0], max_tokens=400, num_denoising_steps=400))
        await until(running, 60.0)
        leaving.cancel()
        await until(idle, 60.0)
        async with client.get("/metrics") as response:
            fates = [line for line in (await response.text()).splitlines() if 'fate="cancelled"' in line]
        assert sum(float(line.split()[-1]) for line in fates if line.startswith("dilaserve_requests_total")) == 1.0


async def test_a_rollout_under_load_loses_no_request(address):
    await asyncio.to_thread(deploy, nodes=2)
    async with session(address) as client:
        before, done = pids("node"), asyncio.Event()

        async def ask(prompt):
            answers = []
            while not done.is_set():
                answers.append(await answer(client, prompt, max_tokens=32, num_denoising_steps=32))
            return answers

        asking = [asyncio.create_task(ask(prompt)) for prompt in PROMPTS[:4]]
        await asyncio.to_thread(deploy, nodes=2, default_max_tokens=77)
        done.set()
        for answers in await asyncio.gather(*asking):
            assert len(answers) > 1
            assert all(ids == answers[0] for ids in answers)
        async with client.get("/v1/stats") as response:
            assert (await response.json())["model"]["default_max_tokens"] == 77

        async def all_new():
            return len(pids("node")) == 2 and not set(before) & set(pids("node"))

        await until(all_new, 60.0)


async def test_nodes_follow_the_backlog_up_and_down(address):
    scaled = {"target_backlog": 1.0, "up_after": 0.5, "down_after": 2.0}
    await asyncio.to_thread(deploy, nodes="2:3", **scaled)
    async with session(address) as client:
        assert len(await nodes(client)) == 2
        done = asyncio.Event()

        async def ask(prompt):
            answers = []
            while not done.is_set():
                answers.append(await answer(client, prompt))
            return answers

        asking = [asyncio.create_task(ask(prompt)) for prompt in PROMPTS]

        async def three():
            return len(await nodes(client)) == 3

        async def one():
            return len(await nodes(client)) == 1

        await until(three, 120.0)
        done.set()
        for answers in await asyncio.gather(*asking):
            assert all(ids == answers[0] for ids in answers)
        await asyncio.to_thread(deploy, nodes="1:3", **scaled)
        slow = asyncio.create_task(answer(client, PROMPTS[0], max_tokens=400, num_denoising_steps=400))
        await until(one, 120.0)
        assert len(await slow) == 400
