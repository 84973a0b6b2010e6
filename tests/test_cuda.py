"""The roads of a GPU, on a device that is pretended (see pretended.py), against the same work on the CPU."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import make
from pretended import Event, Race, Stream, for_workers, pretend
from reference import Llada
from test_parity import cases, expect, some_requests
from test_plans import crowd, whole
from test_reuse import CPU, ROWS, shapes_of, weights_on
from test_reuse import Harness as Plain

from dilaserve import Config, Engine
from dilaserve.models import attention, blocks
from dilaserve.models.spec import Shard
from dilaserve.plans import spelled
from dilaserve.transport.request_table import RequestTable
from dilaserve.worker import main, warm_up
from dilaserve.worker.graph_steps import GRAPHS, ReuseSteps
from dilaserve.worker.memory import Claim, available, pin
from dilaserve.worker.staging import Staging
from dilaserve.worker.step_arrays import active_blocks, columns_of
from dilaserve.worker.step_buffers import DEPTH

GPU = torch.device("cuda:0")


def forget():
    """What was found out about a device must not outlive it."""
    blocks.has_kernels.cache_clear()
    attention.varlen_for.cache_clear()


@pytest.fixture(autouse=True)
def anew():
    yield
    forget()


@pytest.fixture
def machine():
    with pretend() as machine:
        yield machine


class Harness(Plain):
    """In bfloat16, with its reuse steps on fixed buffers."""

    def __init__(self, directory, device, eager=False, **sizes):
        super().__init__(directory, True, device, torch.bfloat16, eager=eager, **sizes)

    def laid_out(self, shapes):
        """Rows of (prompt, block, answer) as spans for a refresh, and to reuse it."""
        self.fill(shapes)
        return self.spans(shapes, refresh=True), self.spans(shapes, refresh=False)

    def denoised(self, shapes, launches=6, most=4):
        """The canvases after a refresh and launches of several steps."""
        refresh, reuse = self.laid_out(shapes)
        list(self.runner.steps(refresh, 1))
        for _ in range(launches):
            list(self.runner.steps(reuse, most))
        return self.table.canvas.copy()


# what the pretended device finds


def test_it_computes_as_the_cpu_does(machine):
    x = torch.arange(12.0, device=GPU).view(3, 4)
    x[1] = torch.tensor([7.0, 8.0, 9.0, 1.0], device=GPU)
    x[x > 8] = 0.5
    assert (x.device, x.T.contiguous().shape) == (GPU, (4, 3))
    assert x.tolist() == [[0, 1, 2, 3], [7, 8, 0.5, 1], [8, 0.5, 0.5, 0.5]]
    assert int(x.argmax()) == 5
    assert torch.from_numpy(np.ones(3)).to(GPU).float().cpu().tolist() == [1, 1, 1]
    with torch.inference_mode():
        assert torch.nn.functional.linear(x, x).cpu()[0, 0] == 14
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_devices_do_not_mix(machine):
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_a_stream_must_wait_for_another(machine):
    x, side, written = torch.zeros(3, device=GPU), torch.cuda.Stream(), torch.cuda.Event()
    x.add_(1)
    with torch.cuda.stream(side), pytest.raises(Race):
        x + 1
    written.record()
    with torch.cuda.stream(side):
        side.wait_event(written)
        y = x + 1
    with pytest.raises(Race):
        x.add_(1)
    torch.cuda.synchronize()
    assert (x.add_(1) + y).tolist() == [4, 4, 4]


def test_memory_in_use_must_not_be_freed(machine):
    x, side = torch.ones(3, device=GPU), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    del x
    with pytest.raises(Race, match="freed"):
        y + 1


def test_pinned_memory_is_looked_at_after_a_wait_and_left_alone_before(machine):
    x, host = torch.ones(3, device=GPU), torch.zeros(3, pin_memory=True)
    arrived = torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    arrived.record()
    assert host.isnan().all()
    arrived.synchronize()
    assert host.tolist() == [1, 1, 1]
    x.copy_(host, non_blocking=True)
    host[1] = 5
    with pytest.raises(Race, match="changed"):
        torch.cuda.synchronize()


def test_a_graph_is_captured_without_running_and_replayed_on_the_same_memory(machine):
    total, graph = torch.zeros(2, device=GPU), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = total.add_(1) * 2
    assert total.tolist() == [0, 0]
    for _ in range(3):
        graph.replay()
    assert total.tolist() == [3, 3]
    assert torch.isnan(inside).all()
    for waits in (lambda: total.tolist(), lambda: total.cpu(), lambda: bool(total.any()), torch.cuda.synchronize):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            waits()


def test_memory_ends():
    with pretend(memory=1000) as machine:
        kept = torch.zeros(200, device=GPU)
        with pytest.raises(torch.OutOfMemoryError):
            kept + 1
        assert torch.cuda.mem_get_info() == (200, 1000)
        del kept
        assert machine.allocated == [0]


# steps


@pytest.mark.parametrize("count", [1, 3, 5, 8, 17])
def test_steps_of_a_gpu_do_what_those_of_a_cpu_do(random_model, machine, count):
    shapes = shapes_of(count)
    graphs, eager = Harness(random_model, GPU), Harness(random_model, GPU, eager=True)
    canvases = graphs.denoised(shapes)
    assert np.array_equal(canvases, eager.denoised(shapes))
    assert (len(graphs.reuse.graphs), len(eager.reuse.graphs)) == (2, 0)
    here = Harness(random_model, CPU).denoised(shapes)
    masks, others = ((found == graphs.spec.mask_id).sum() for found in (canvases, here))
    assert np.mean(here == canvases) > 0.95  # attention rounds once there and more often here
    assert masks == others or masks < 3 * count


def test_every_step_of_a_launch_says_what_it_was(random_model, machine):
    harness, shapes = Harness(random_model, GPU), shapes_of(3)
    refresh, reuse = harness.laid_out(shapes)
    outcomes = list(harness.runner.steps(refresh, 6, [(span,) for span in reuse]))
    stages = [[result.stage for result in outcome.results] for outcome in outcomes]
    assert stages == [[0] * 3, *[[1] * 3] * (len(outcomes) - 1)]
    left = [span.block_end - span.block_start for span in refresh]
    for outcome in outcomes:
        assert [result.rested for result in outcome.results] == [not masks for masks in left]
        left = [result.masks_left for result in outcome.results]


def test_rows_come_and_go_between_launches(random_model, machine):
    """Batches of all sizes on the same buffers, in any order, say the same with graphs and without."""
    harnesses, rng = [Harness(random_model, GPU, eager) for eager in (False, True)], np.random.default_rng(3)
    for count in rng.integers(1, ROWS + 1, 12):
        shapes = shapes_of(int(count))[::-1]
        one, other = (harness.denoised(shapes, launches=2) for harness in harnesses)
        assert np.array_equal(one, other)
    assert len(harnesses[0].reuse.graphs) > 3


@pytest.mark.parametrize(("where", "name"), [(Stream, "wait_event"), (Event, "synchronize"), (Event, "record")])
def test_no_wait_is_one_too_many(random_model, machine, monkeypatch, where, name):
    """Without any one of its waits the road would be caught."""
    harness, shapes = Harness(random_model, GPU), shapes_of(4)
    expected = Harness(random_model, GPU).denoised(shapes)
    monkeypatch.setattr(where, name, lambda *_: None)
    try:
        found = harness.denoised(shapes)
    except (Race, RuntimeError, OverflowError, IndexError):
        return
    assert not np.array_equal(found, expected)


def test_more_steps_than_there_are_places_for_results_are_caught(random_model, machine):
    harness = Harness(random_model, GPU)
    refresh, reuse = harness.laid_out(shapes_of(3))
    list(harness.runner.steps(refresh, 1))
    columns = columns_of(reuse)
    harness.reuse.load(columns, active_blocks(columns), harness.table)
    for _ in range(DEPTH):
        harness.reuse.launch()
    with pytest.raises(Race):
        harness.reuse.launch()


def test_steps_go_on_where_no_graph_can_be_captured(random_model, machine, monkeypatch, caplog):
    expected = Harness(random_model, GPU, eager=True).denoised(shapes_of(3))

    def refused(*_, **__):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    harness = Harness(random_model, GPU)
    assert np.array_equal(harness.denoised(shapes_of(3)), expected)
    assert harness.reuse.graphs.eager
    assert "no CUDA graph of 4 rows (CUDA error: operation not permitted when stream is capturing)" in caplog.text


def test_a_step_laid_out_anew_sends_once_and_waits_once(random_model, machine, monkeypatch):
    """The host runs ahead of the device until it needs the result."""
    harness, shapes = Harness(random_model, GPU), shapes_of(6)
    refresh, reuse = harness.laid_out(shapes)
    waits, sent = [], []
    wait, copied = machine.wait, machine.copied
    monkeypatch.setattr(machine, "wait", lambda clock: (waits.append(clock), wait(clock)))
    monkeypatch.setattr(machine, "copied", lambda *given: (sent.append(given), copied(*given))[1])
    assert harness.runner.step(columns_of([*refresh[:3], *reuse[3:]])).results
    assert len(waits) == 2  # for what the last step sent, long gone, and for the result
    assert len(sent) == 2  # there and back


@pytest.mark.parametrize("cold", [0.0, 0.7])
def test_rows_that_sample_do_on_a_gpu_what_they_do_on_a_cpu(random_model, machine, cold):
    shapes, canvases = shapes_of(5), []
    for device in (GPU, CPU):
        harness = Harness(random_model, device)
        refresh, _ = harness.laid_out(shapes)
        harness.table.temperature[:5] = [cold, 0.5, 1.0, 0.0, 2.0]
        harness.table.top_p[:5] = [1.0, 0.9, 1.0, 1.0, 0.5]
        for step in range(4):
            list(harness.runner.steps([span._replace(step=step) for span in refresh], 1))
        canvases.append(harness.table.canvas.copy())
    assert np.mean(canvases[0] == canvases[1]) > 0.95


def test_arrays_are_sent_together_as_they_are(machine):
    staging, rng = Staging(GPU), np.random.default_rng(0)
    for size in (0, 3, 200, 7):
        arrays = [
            rng.integers(0, 9, (size, 2)),
            None,
            rng.random(size),
            np.arange(2 * size, dtype=np.int32)[::2],
            np.zeros(0, dtype=np.float32),
            rng.random(5) > 0.5,
        ]
        found = staging.send(arrays)
        assert found[1] is None
        for array, tensor in zip(arrays, found, strict=True):
            assert array is None or (tensor.device, tensor.shape) == (GPU, array.shape)
            assert array is None or np.array_equal(tensor.cpu().numpy(), array)
            assert array is None or tensor.cpu().numpy().dtype == array.dtype


# memory


def test_the_pool_leaves_room_for_the_largest_steps(tmp_path, monkeypatch):
    """All memory is given to K/V; then the largest refresh, the most reuse rows and all graphs run on what is left."""
    directory, rows, tokens = make(tmp_path / "model", width=128, mlp=1024, layers=3), 40, 4096
    monkeypatch.setattr(warm_up, "SLACK", 2**16)
    job = SimpleNamespace(kv_tokens=None, claim=Claim(), batched_tokens=tokens, max_rows=rows, kv_wanted=2**40)
    with pretend(memory=96 * 2**20) as machine:
        spec, _, weights = weights_on(GPU, directory, torch.bfloat16)
        pool = main.kv_tokens(job, spec, weights)
        del weights
        harness = Harness(directory, GPU, tokens=pool, rows=rows)
        left = machine.memory - machine.allocated[0]
        machine.peak[0] = 0
        canvas = spec.max_length
        refresh, _ = harness.laid_out([(canvas - 32, 32, 32)] * (tokens // canvas))
        list(harness.runner.steps(refresh, 1))
        for count in (40, 17, *range(16, 0, -2), 1):
            _, reuse = harness.laid_out([(100, 32, 64)] * count)
            list(harness.runner.steps(reuse, 4))
    assert len(harness.reuse.graphs) == 11
    assert machine.peak[0] > machine.memory - left / 2  # and the room was no waste


def test_no_kernel_is_left_to_be_compiled_while_somebody_waits(random_model, machine, monkeypatch):
    """Those of few rows are others than those of many; all are run at the start."""
    spec, family, weights = weights_on(GPU, random_model, torch.bfloat16)
    seen, run = [], ReuseSteps.rehearse
    monkeypatch.setattr(ReuseSteps, "rehearse", lambda steps, rows: (seen.append(rows), run(steps, rows)))
    warm_up.rehearsed(spec, family.Model(spec, weights), 128, 20)
    assert set(seen) == {count for count in GRAPHS if count <= 20}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_of_the_weights_is_rehearsed_as_well(random_model, machine, rank):
    """It has the logits of half the vocabulary, and no step that one device alone would take."""
    job = SimpleNamespace(kv_tokens=None, claim=Claim(), batched_tokens=512, max_rows=8, kv_wanted=4096)
    spec, _, weights = weights_on(GPU, random_model, torch.bfloat16, Shard(rank, 2))
    assert main.kv_tokens(job, spec, weights) == 4096


@pytest.mark.parametrize("can", [True, False])
def test_a_table_that_cannot_be_pinned_is_none_the_worse(machine, caplog, can):
    machine.pins = can
    table = RequestTable(2, 64)
    pin(table.buffer, GPU)
    assert torch.ones(3, device=GPU).tolist() == [1, 1, 1]
    assert machine.is_pinned(table.buffer) == can
    assert ("could not be pinned (CUDA error 800)" in caplog.text) != can


def test_workers_of_one_gpu_have_their_shares_whoever_comes_first():
    mib, claim = 2**20, Claim(share=0.45, spared=0.1)
    with pretend(memory=100 * mib) as machine:
        alone = available(GPU, claim)
        machine.elsewhere = 45 * mib
        assert available(GPU, claim) == alone == 45 * mib
        held = torch.empty(20 * mib, dtype=torch.uint8, device=GPU)
        assert available(GPU, claim) == 25 * mib
        machine.elsewhere = 60 * mib  # by somebody who is none of them
        assert available(GPU, claim) == 10 * mib
        machine.elsewhere = 75 * mib
        assert available(GPU, claim) == 0
        del held


# engines


async def answers(directory, requests, **settings):
    config = Config.of(model=str(directory), **settings)
    async with Engine(config) as engine:
        assert (await engine.generate(*cases(requests)[0])).token_ids
        return [(await engine.generate(*case)).token_ids for case in cases(requests)]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
async def test_an_engine_serves_on_gpus_changes_its_plan_and_survives_a_kill(random_model, monkeypatch, backend, capfd):
    """In float32 all plans and all devices say the same."""
    for name, value in for_workers(2).items():
        monkeypatch.setenv(name, value)
    requests = [request | {"cache": "none"} for request in some_requests(8, seed=5)]
    with pretend(2):
        config = Config.of(model=str(random_model), dtype="float32", devices="auto", group_backend=backend)
        async with Engine(config) as engine:
            running = asyncio.gather(*(engine.generate(*case) for case in cases(requests)))
            for plan in ("1x2", "2x1", "1x2"):
                await asyncio.sleep(0.1)
                await engine.replan(plan)
            expect(Llada(random_model), requests, await running)
            await crowd(engine, lambda: os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL))
            await whole(engine)
            assert spelled(engine.plan) == "1x2"
            expect(Llada(random_model), requests[:3], [await engine.generate(*case) for case in cases(requests[:3])])
    assert "terminate" not in capfd.readouterr().err  # threads that outlived their interpreter


async def test_an_engine_says_the_same_with_graphs_and_without(random_model, monkeypatch):
    for name, value in for_workers(1).items():
        monkeypatch.setenv(name, value)
    requests = some_requests(5, seed=6)
    with pretend(1):
        graphs = await answers(random_model, requests, devices="auto")
        eager = await answers(random_model, requests, devices="cuda:0", enforce_eager="on")
    assert graphs == eager


def test_the_bench_for_gpus_can_be_run(tmp_path):
    """So that the first card of its kind that it meets is not its first at all."""
    report, root = tmp_path / "report.md", Path(__file__).parent.parent
    sections = "kernels,reuse,refresh,numerics,parts"
    words = ["1", "-m", "bench.gpu", "--shape", "tiny", "--only", sections, "--out", str(report)]
    command = [sys.executable, str(root / "tests" / "pretended.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    told = report.read_text()
    assert "Failed" not in told
    assert "Skipped" not in told
    for goal in ("graph against the same function", "CUDA graphs captured", "loss against float32"):
        assert re.search(rf"\| {goal}.*\| met \|", told), told
