"""Triton's kernels, interpreted on the CPU, against their twins in plain torch."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import family_checkpoints
import numpy as np
import pytest
import torch
from checkpoints import make
from cuda_harness import GPU, Harness, forget
from fake_cuda import fake_gpus
from runner_harness import shapes_of, weights_on
from triton_interpreter import mended

from dilaserve.models import attention, blocks, spans
from dilaserve.models.transformer import Model
from dilaserve.worker import candidates, confidence, step_buffers, step_kernels
from dilaserve.worker.step_arrays import active_blocks, columns_of

if "triton" in sys.modules:
    pytest.skip("Triton was imported before it could be told to interpret", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # its decorators look when they are imported; nothing else here may inherit it
try:
    pytest.importorskip("triton")
    from dilaserve.models import kernels as of_layers
    from dilaserve.worker import kernels as of_logits
finally:
    del os.environ["TRITON_INTERPRET"]

MASK = 7


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with mended():
        yield


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(one, other):
    """To the last place, which sums in another order may change."""
    short = one.dtype == torch.bfloat16
    return torch.allclose(one.float(), other.float(), rtol=2**-7 if short else 1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [40, 300, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sweep_finds_what_the_twin_finds(vocab, dtype):
    logits = random(7, vocab, dtype=dtype, scale=5.0)
    logits[1] = logits[1] * 0 + 1  # all equal
    logits[2, vocab - 1] = 80.0
    logits[3, [5, vocab // 2]] = 90.0
    logits[4] -= 200.0
    found, expected = of_logits.best(logits.clone(), MASK), confidence.plain(logits.clone(), MASK)
    assert torch.equal(found.token, expected.token)
    assert torch.allclose(found.odds, expected.odds, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_of_broken_logits_get_no_confidence_and_never_the_mask_token():
    inf, nan = torch.inf, torch.nan
    logits = random(8, 50)
    logits[0], logits[1] = nan, -inf
    logits[2, 3] = nan
    logits[3, [4, 30]] = inf
    logits[4, 9] = inf
    logits[5, MASK] = inf
    logits[6, MASK] = nan
    logits[7, MASK] = 300.0
    found, expected = of_logits.best(logits.clone(), MASK), confidence.plain(logits.clone(), MASK)
    assert torch.equal(found.odds, expected.odds)
    assert expected.odds[4] == 0.0
    assert (expected.odds[[0, 1, 2, 3, 5, 6, 7]] == candidates.HOPELESS).all()
    assert (found.token != MASK).all()
    assert (found.token < 50).all()
    whole = [1, 3, 4, 5, 6, 7]
    assert torch.equal(found.token[whole], expected.token[whole])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 48, 1024])
def test_sum_and_norm_agree(width, dtype):
    x, delta = (random(5, width, dtype=dtype, seed=i) for i in range(2))
    weight = random(width, dtype=dtype, seed=2)
    total, normed = of_layers.add_norm(x, delta, weight, 1e-5)
    expected_total, expected = blocks.add_norm(x, delta, weight, 1e-5)
    assert close(total, expected_total)
    assert close(normed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "q", "kv", "dim", "turned"),
    [(2, 2, 2, 8, 8), (1, 3, 1, 12, 12), (4, 1, 1, 16, 16), (2, 2, 1, 16, 8), (2, 1, 1, 12, 6), (1, 2, 2, 24, 2)],
)
def test_rotary_heads_are_written_to_the_same_places(groups, q, kv, dim, turned, dtype):
    tokens, pool = 6, 40
    fused = random(tokens, groups, q + 2 * kv, dim, dtype=dtype)
    turns = blocks.rotary_table(64, turned, 1e4, torch.device("cpu"))[torch.arange(tokens) * 3]
    slots = torch.tensor([3, 0, 39, 17, 8, 9])
    stores = [torch.zeros(pool, groups * kv, dim, dtype=dtype) for _ in range(4)]
    found = of_layers.place(fused, turns, slots, *stores[:2], q, kv)
    expected = blocks.place(fused, turns, slots, *stores[2:], q, kv)
    for one, other in ((found, expected), (stores[0], stores[2]), (stores[1], stores[3])):
        assert close(one, other)
    assert torch.equal(stores[1], stores[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "width"), [(2, 24), (3, 1000)])
def test_gates_agree(groups, width, dtype):
    fused = random(4, groups, 2, width, dtype=dtype, scale=2.0)
    found, expected = of_layers.gated(fused.clone()), blocks.gated(fused.clone())
    assert close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("heads", "shared", "dim"), [(2, 1, 16), (4, 2, 24), (2, 2, 160)])
def test_attention_of_even_runs_agrees(heads, shared, dim, splits, dtype):
    """Also runs that begin anywhere, end within a tile, and have fewer keys than there are parts."""
    used, starts, queries = [1, 200, 33], [7, 300, 480], 16
    q = random(len(used) * queries, heads, dim, dtype=dtype)
    keys, values = (random(520, heads // shared, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    offsets = torch.arange(len(used) + 1, dtype=torch.int32) * queries
    of = lambda numbers: torch.tensor(numbers, dtype=torch.int32)  # noqa: E731
    runs = spans.Runs(offsets, of([*starts, 0]), of(used), queries, 520, even=True)
    found = of_layers.attend_even(q, keys, values, runs, splits)
    expected = attention.each_run(q.float(), keys.float(), values.float(), runs)
    assert found.dtype == dtype
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_keys_are_split_while_processors_are_idle(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = [of_layers.splits_for(rows * 32, GPU) for rows in (1, 2, 3, 4, 5, 8, 64)]
    assert found == [4, 2, 1, 1, 1, 1, 1]
    assert of_layers.splits_for(2, GPU) == of_layers.MOST_SPLITS


def some_rows(rows, seed):
    """Buffers of rows under all rules, some with few or no masks, and a guess for them with many equal odds."""
    rng = np.random.default_rng(seed)
    batch = torch.from_numpy(rng.integers(0, 40, (rows + 2, step_buffers.WIDTH + len(step_buffers.FIELDS))))
    masks = torch.from_numpy(rng.random((rows + 2, step_buffers.WIDTH)) < rng.choice([0, 0.1, 0.6, 1.0], (rows + 2, 1)))
    batch[:, : step_buffers.WIDTH][masks] = MASK
    fields, reals = batch[:, step_buffers.WIDTH :], batch.view(torch.float64)
    fields[:, 0] *= 64
    windows = np.sort(rng.integers(0, step_buffers.WIDTH + 1, (rows + 2, 3)), axis=1)  # first, end, length
    fields[:, 3:6] = torch.from_numpy(windows[:, [2, 0, 1]])
    fields[:, 6] = torch.from_numpy(rng.integers(0, 2, rows + 2))
    fields[:, 7] = torch.arange(rows + 2) % 4
    fields[:, 8] = torch.from_numpy(rng.integers(0, 9, rows + 2))
    reals[:, -2] = torch.from_numpy(rng.choice([0.0, 0.3, 0.5, 0.9, 1.0], rows + 2))
    reals[:, -1] = torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 1.5, 30.0], rows + 2))
    found = torch.full((step_buffers.DEPTH, rows + 2, 2, step_buffers.WIDTH), 77, dtype=torch.int32)
    odds = rng.choice([0.0, 1e-9, 0.01, 0.2, 1.0, 1.0, 7.0, float(candidates.HOPELESS)], rows * step_buffers.WIDTH)
    guess = candidates.Candidates(
        torch.from_numpy(rng.integers(0, 40, rows * step_buffers.WIDTH)), torch.from_numpy(odds).float()
    )
    return step_buffers.Buffers(batch, found, torch.tensor([seed % step_buffers.DEPTH])), guess


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_laid_out_and_unmasked_alike(seed):
    rows = 1 + 3 * seed
    (mine, guess), (theirs, _) = (some_rows(rows, seed) for _ in range(2))
    for one, other in zip(of_logits.lay_out(mine, rows, 5000), step_kernels.lay_out(theirs, rows, 5000), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    of_logits.unmask(mine, rows, MASK, guess)
    step_kernels.unmask(theirs, rows, MASK, guess)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
    assert (mine.found[mine.turn.item(), :rows, 0] != 77).all()
    assert (mine.found[1 - mine.turn.item()] == 77).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_graph_of_kernels_does_what_plain_steps_do(tmp_path):
    """On a fake GPU."""
    directory, shapes = make(tmp_path / "model", layers=1, heads=2), shapes_of(1)
    with fake_gpus():
        expected = Harness(directory, GPU).denoised(shapes, launches=2, most=2)
    forget()
    with fake_gpus(kernels=True):
        harness = Harness(directory, GPU, rows=1)
        found = harness.denoised(shapes, launches=2, most=2)
    forget()
    assert harness.model.kernels is of_layers.KERNELS
    assert len(harness.reuse.graphs) == 1
    assert ((found[0] == MASK) == (expected[0] == MASK)).all()
    assert (found[0] == expected[0]).mean() > 0.95


def test_experts_gate_by_the_kernel(tmp_path):
    directory, x = family_checkpoints.make(tmp_path / "model", "LLaDAMoEModelLM"), random(9, 32, dtype=torch.bfloat16)
    found = []
    for there in (False, True):
        with fake_gpus(kernels=there):
            model = Model(*weights_on(GPU, directory, torch.bfloat16))
            assert (model.kernels is of_layers.KERNELS) == there
            assert not model.waits
            found.append(model.feed_forward(1, x.to(GPU)).cpu())
        forget()
    assert close(*found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_of_a_graph_is_few_launches(tmp_path):
    """Each is some microseconds of a step that reads weights for a few tokens."""
    counts = []
    for layers_there in (1, 2):
        directory = make(tmp_path / str(layers_there), layers=layers_there, heads=2)
        with fake_gpus(kernels=True):
            harness = Harness(directory, GPU, rows=1)
            _, (span,) = harness.laid_out(shapes_of(1))
            columns = columns_of([span])
            harness.reuse.load(columns, active_blocks(columns), harness.table)
            counts.append(harness.reuse.graphs.captured[1].launches)
        forget()
    layer = counts[1] - counts[0]
    assert (layer["kernel"], layer["mm"], layer.total()) == (6, 4, 10)  # of few rows; of more attention is one kernel
    around = counts[0] - layer
    assert around["kernel"] == 3  # rows laid out, logits judged, tokens unmasked
    assert around.total() <= 14  # beside them positions, embeddings, the first norm, the head


def test_kernels_compile_for_gpus_and_keep_to_their_registers(tmp_path):
    """To the processor's own code, for which it need not be there."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    known = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    del known["TRITON_INTERPRET"]
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=known, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" 0 bytes spilt") == len(done.stdout.splitlines()) == 2 * (4 * 3 + 4)
