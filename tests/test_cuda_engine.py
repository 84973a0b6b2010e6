"""An engine on fake GPUs, and the bench for GPUs on one."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_harness import fresh_device_caches  # noqa: F401 - a fixture
from fake_cuda import fake_gpus, for_workers
from parity import expect, some_requests, wishes
from reference_loops import Llada
from worker_faults import answers_under_fault, wait_for_plan

from dilaserve import Config, Engine
from dilaserve.plans import spelled


async def answers(directory, requests, **settings):
    config = Config.of(model=str(directory), **settings)
    async with Engine(config) as engine:
        assert (await engine.generate(*wishes(requests)[0])).token_ids
        return [(await engine.generate(*wish)).token_ids for wish in wishes(requests)]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
async def test_an_engine_serves_on_gpus_changes_its_plan_and_survives_a_kill(random_model, monkeypatch, backend, capfd):
    """In float32 all plans and all devices say the same."""
    for name, value in for_workers(2).items():
        monkeypatch.setenv(name, value)
    requests = [request | {"cache": "none"} for request in some_requests(8, seed=5)]
    with fake_gpus(2):
        config = Config.of(model=str(random_model), dtype="float32", devices="auto", group_backend=backend)
        async with Engine(config) as engine:
            running = asyncio.gather(*(engine.generate(*wish) for wish in wishes(requests)))
            for plan in ("1x2", "2x1", "1x2"):
                await asyncio.sleep(0.1)
                await engine.replan(plan)
            expect(Llada(random_model), requests, await running)
            await answers_under_fault(engine, lambda: os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL))
            await wait_for_plan(engine)
            assert spelled(engine.plan) == "1x2"
            expect(Llada(random_model), requests[:3], [await engine.generate(*wish) for wish in wishes(requests[:3])])
    assert "terminate" not in capfd.readouterr().err  # threads that outlived their interpreter


async def test_an_engine_says_the_same_with_graphs_and_without(random_model, monkeypatch):
    for name, value in for_workers(1).items():
        monkeypatch.setenv(name, value)
    requests = some_requests(5, seed=6)
    with fake_gpus(1):
        graphs = await answers(random_model, requests, devices="auto")
        eager = await answers(random_model, requests, devices="cuda:0", enforce_eager="on")
    assert graphs == eager


def test_the_bench_for_gpus_can_be_run(tmp_path):
    """So that the first card of its kind that it meets is not its first at all."""
    report, root = tmp_path / "report.md", Path(__file__).parent.parent
    sections = "kernels,reuse,refresh,numerics,parts"
    words = ["1", "-m", "bench.gpu", "--shape", "tiny", "--only", sections, "--seed", "1", "--out", str(report)]
    command = [sys.executable, str(root / "tests" / "fake_cuda"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    told = report.read_text()
    assert "Failed" not in told
    assert "Skipped" not in told
    for goal in ("graph against the same function", "CUDA graphs captured", "loss against float32"):
        assert re.search(rf"\| {goal}.*\| met \|", told), told
