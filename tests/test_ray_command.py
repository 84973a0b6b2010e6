"""`dilaserve ray` as a process, and what it says of flags that cannot be. Needs the extra `ray`."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")

from ray_cluster import pids
from worker_waits import until

LONG = {"prompt": "Reverse: lamu", "max_tokens": 64, "num_denoising_steps": 64, "ignore_eos": True, "cache": "none"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "nodes '0': write a number such as 2, or a range such as 1:4"),
        (["--nodes", "3:1"], "nodes '3:1': write a number such as 2, or a range such as 1:4"),
        (["--nodes", "1:"], "nodes '1:': write a number such as 2, or a range such as 1:4"),
        (["--nodes", "many"], "nodes 'many': write a number such as 2, or a range such as 1:4"),
        (["--port", "0"], "Ray's proxy listens on one --host and one --port; give one of each, and not port 0"),
        (["--host", "127.0.0.1,::1"], "Ray's proxy listens on one --host and one --port"),
        (["--target-backlog", "0"], "'0' is no number above 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--node", "2"], "did you mean --nodes?"),
    ],
)
def test_what_cannot_be_is_said_before_ray_starts(run_main, words, said):
    code, out, error = run_main("ray", *words)
    assert (code, out) == (2, "")
    assert said in error


def test_without_the_extra_the_command_says_how_to_install_it(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "dilaserve.ray.command", None)
    code, _, error = run_main("ray")
    assert code == 2
    assert "pip install 'dilaserve[ray]'" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_answer_end_and_leaves_no_process(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dilaserve", "ray", "--port", str(port), "--devices", "cpu"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        ready = next(line for line in server.stdout if line.startswith("ready:"))
        assert f"ready: dilaserve-tiny on http://127.0.0.1:{port}" in ready
        assert len(pids("node", server.pid)) == 1
        url = f"http://127.0.0.1:{port}/v1/completions"

        def ask():
            request = urllib.request.Request(url, json.dumps(LONG).encode(), {"content-type": "application/json"})
            with urllib.request.urlopen(request) as response:
                return json.load(response)

        async def asked_and_interrupted():
            await asyncio.to_thread(ask)
            running = asyncio.create_task(asyncio.to_thread(ask))
            await until(lambda: running.done() or requests_running(port))
            server.send_signal(number)
            return await running

        answer = asyncio.run(asked_and_interrupted())
        assert answer["usage"]["completion_tokens"] == 64
        assert server.wait(60) == 0
        assert "Traceback" not in server.stderr.read()
        assert pids("node", server.pid) == []
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def requests_running(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/stats") as response:
        return json.load(response)["requests"]["running"]
