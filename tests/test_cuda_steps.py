"""Steps on the fake GPU against the same steps on the CPU."""

from types import SimpleNamespace

import family_checkpoints
import numpy as np
import pytest
import torch
from checkpoints import make
from cuda_harness import GPU, Harness, fresh_device_caches  # noqa: F401 - a fixture
from fake_cuda import Event, Race, Stream, fake_gpus
from runner_harness import CPU, ROWS, shapes_of, weights_on

from dilaserve.models.spec import Shard
from dilaserve.models.transformer import Model
from dilaserve.transport.request_table import RequestTable
from dilaserve.worker import main, warm_up
from dilaserve.worker.graph_steps import GRAPHS, ReuseSteps
from dilaserve.worker.memory import Claim, available, pin
from dilaserve.worker.staging import Staging
from dilaserve.worker.step_arrays import active_blocks, columns_of
from dilaserve.worker.step_buffers import DEPTH


@pytest.fixture
def machine():
    with fake_gpus() as machine:
        yield machine


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


@pytest.fixture(params=["A2DQwen3LMHeadModel", "A2DQwen2LMHeadModel"])
def family_model(request, tmp_path):
    """Made before there is a fake GPU, which transformers takes for one of its own."""
    return family_checkpoints.make(tmp_path, request.param)


def test_graphs_of_layers_with_norms_or_biases_do_what_plain_steps_do(family_model, machine):
    """Queries and keys are normed, or have biases, between kernels that know of neither."""
    shapes, directory = shapes_of(5), family_model
    graphs, eager = Harness(directory, GPU), Harness(directory, GPU, eager=True)
    canvases = graphs.denoised(shapes)
    assert np.array_equal(canvases, eager.denoised(shapes))
    assert graphs.reuse.graphs
    assert np.mean(Harness(directory, CPU).denoised(shapes) == canvases) > 0.95


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
def test_a_missing_wait_in_a_step_is_detected(random_model, machine, monkeypatch, where, name):
    """Without any one of its waits the step raises or gives other tokens."""
    harness, shapes = Harness(random_model, GPU), shapes_of(4)
    expected = Harness(random_model, GPU).denoised(shapes)
    monkeypatch.setattr(where, name, lambda *_: None)
    try:
        found = harness.denoised(shapes)
    except (Race, RuntimeError, OverflowError, IndexError):
        return
    assert not np.array_equal(found, expected)


def test_more_steps_in_flight_than_result_buffers_raise(random_model, machine):
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


def test_the_pool_leaves_room_for_the_largest_steps(tmp_path, monkeypatch):
    """All memory is given to K/V; then the largest refresh, the most reuse rows and all graphs run on what is left."""
    directory, rows, tokens = make(tmp_path / "model", width=128, mlp=1024, layers=3), 40, 4096
    monkeypatch.setattr(warm_up, "SLACK", 2**16)
    job = SimpleNamespace(kv_tokens=None, claim=Claim(), batched_tokens=tokens, max_rows=rows, kv_wanted=2**40)
    with fake_gpus(memory=96 * 2**20) as machine:
        spec, weights = weights_on(GPU, directory, torch.bfloat16)
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


def test_warm_up_compiles_every_kernel(random_model, machine, monkeypatch):
    """Those of few rows are others than those of many; all are run at the start."""
    spec, weights = weights_on(GPU, random_model, torch.bfloat16)
    seen, run = [], ReuseSteps.rehearse
    monkeypatch.setattr(ReuseSteps, "rehearse", lambda steps, rows: (seen.append(rows), run(steps, rows)))
    warm_up.rehearsed(spec, Model(spec, weights), 128, 20)
    assert set(seen) == {count for count in GRAPHS if count <= 20}


@pytest.mark.parametrize("rank", [0, 1])
def test_warm_up_works_with_a_shard_of_the_weights(random_model, machine, rank):
    """It has the logits of half the vocabulary, and no step that one device alone would take."""
    job = SimpleNamespace(kv_tokens=None, claim=Claim(), batched_tokens=512, max_rows=8, kv_wanted=4096)
    spec, weights = weights_on(GPU, random_model, torch.bfloat16, Shard(rank, 2))
    assert main.kv_tokens(job, spec, weights) == 4096


@pytest.mark.parametrize("can", [True, False])
def test_a_request_table_that_cannot_be_pinned_still_works(machine, caplog, can):
    machine.pins = can
    table = RequestTable(2, 64)
    pin(table.buffer, GPU)
    assert torch.ones(3, device=GPU).tolist() == [1, 1, 1]
    assert machine.is_pinned(table.buffer) == can
    assert ("could not be pinned (CUDA error 800)" in caplog.text) != can


def test_workers_of_one_gpu_get_their_memory_shares_in_any_order():
    mib, claim = 2**20, Claim(share=0.45, spared=0.1)
    with fake_gpus(memory=100 * mib) as machine:
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
