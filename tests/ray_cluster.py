"""Ray on this machine with the door and nodes on it, for tests; all processes are real."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}

import aiohttp
import ray
from ray import serve

from dilaserve.ray.app import app

NAME = "dilaserve"
QUIET = {"devices": "cpu", "cpu_threads": 1, "log_level": "warning"}
STEPS = 96  # of each long answer, one token each
LONG = {
    "max_tokens": STEPS,
    "num_denoising_steps": STEPS,
    "ignore_eos": True,
    "cache": "none",
    "return_token_ids": True,
}


@contextlib.contextmanager
def started():
    """Ray with a proxy; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=16, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(**given):
    """Roll out the application and wait until it runs."""
    serve.run(app(QUIET | given), name=NAME, route_prefix="/")


def pids(name, driver=None):
    """The processes of the replicas of this deployment, in the Ray that the driver (this process) has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                if command.startswith(f"ray::ServeReplica:{NAME}:{name}".encode()):
                    found.append(int(folder.name))
    return sorted(pid for pid in found if parent(parent(pid)) == (driver or os.getpid()))


def parent(pid):
    """0 for a process that has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


def kill(pid):
    os.kill(pid, signal.SIGKILL)


async def answer(client, prompt, **options):
    """The token ids of a streamed completion; fails on any error."""
    body = {"prompt": prompt, "stream": True, **LONG, **options}
    ids, ended = [], None
    async with client.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = ray_json(line)
                assert "error" not in event, event
                (choice,) = event["choices"]
                ids += choice.get("token_ids") or []
                ended = choice["finish_reason"] or ended
    assert ended == "length"
    return ids


def ray_json(line):
    return json.loads(line.removeprefix(b"data: "))


async def nodes(client):
    """The names of the nodes that answer."""
    async with client.get("/v1/plan") as response:
        return sorted((await response.json()).get("nodes", {})) if response.status == 200 else []


async def until(condition, within):
    """Wait until the awaited condition holds; gives the seconds that took."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within, "it did not come true"
        await asyncio.sleep(0.2)
    return time.monotonic() - began


def session(address):
    return aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0))
