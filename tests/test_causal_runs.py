"""Spans that see causally share a call of attention, and are computed as token by token."""

from types import SimpleNamespace

import block_checkpoints
import numpy as np
import pytest
import torch
from cuda_harness import GPU, Harness, fresh_device_caches  # noqa: F401 - a fixture
from fake_cuda import fake_gpus
from runner_harness import CPU
from torch.nn.attention.varlen import varlen_attn

from dilaserve.models import attention
from dilaserve.models.attention import attend, grouped
from dilaserve.models.spans import Runs, SplitRuns
from dilaserve.types import Decoding, Span
from dilaserve.worker.attention_runs import joined, split_by_kind
from dilaserve.worker.model_runner import packed_spans
from dilaserve.worker.step_arrays import columns_of

# a part of a prompt; an open block; what was not kept, and the block; the prompt up to its end; blocks of 4
CHUNK = Span(0, 1, 0, start=5, length=11, keys=16, block_start=40, block_end=40, quota=0, step=0, grain=1, origin=40)
OPEN = Span(1, 1, 64, start=20, length=8, keys=28, block_start=20, block_end=28, quota=0, step=0)
LATER = Span(2, 1, 128, start=0, length=25, keys=25, block_start=17, block_end=25, quota=0, step=0, grain=1, origin=17)
FIRST = Span(3, 1, 192, start=30, length=1, keys=31, block_start=31, block_end=32, quota=0, step=0, grain=1, origin=31)
BLOCKS = Span(4, 1, 256, start=2, length=12, keys=14, block_start=10, block_end=14, quota=0, step=0, grain=4, origin=10)
BATCHES = [[CHUNK], [OPEN, CHUNK, LATER], [LATER, FIRST, BLOCKS, OPEN], [CHUNK, FIRST], [BLOCKS, OPEN]]


def runs_of(spans):
    parts = split_by_kind(columns_of(spans))
    sent = [None if array is None else torch.from_numpy(array) for part in parts for array in part.sent]
    return joined(parts, sent)


def drawn(spans, dtype=torch.float32):
    """Queries of the spans, and a pool of one layer."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(320, 2, 16, generator=generator).to(dtype) for _ in range(2))
    queries = torch.randn(sum(span.length for span in spans), 4, 16, generator=generator).to(dtype)
    return queries, SimpleNamespace(keys=[keys], values=[values])


def by_mask(spans, queries, pool):
    """The twin: each span under an explicit mask."""
    columns = columns_of(spans)
    return attend(queries, pool, 0, grouped(packed_spans(columns.length, columns), CPU))


@pytest.mark.parametrize("spans", BATCHES)
def test_causal_runs_attend_as_under_an_explicit_mask(spans):
    queries, pool = drawn(spans)
    torch.testing.assert_close(attend(queries, pool, 0, runs_of(spans)), by_mask(spans, queries, pool))


@pytest.mark.parametrize("spans", BATCHES)
@pytest.mark.parametrize(
    "call",
    [
        attention.raw_varlen(),
        attention.public_varlen(varlen_attn, dict(window_size=(-1, 0))),
    ],
)
def test_calls_of_flash_attention_are_told_which_runs_are_causal(spans, call, monkeypatch):
    """Its alignment is that of the last query to the last key, as fake_cuda's is."""
    queries, pool = drawn(spans, torch.bfloat16)
    monkeypatch.setattr(attention, "varlen_for", lambda *where: call)
    found, expected = attend(queries, pool, 0, runs_of(spans)), by_mask(spans, queries, pool)
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=2**-7)


def test_there_is_a_second_call_only_where_both_kinds_meet():
    kinds = [type(runs_of(spans)) for spans in BATCHES]
    assert kinds == [Runs, SplitRuns, SplitRuns, Runs, Runs]
    assert runs_of([CHUNK, FIRST]).causal
    assert not runs_of([BLOCKS, OPEN]).causal
    assert len(runs_of([CHUNK]).keys) == 1  # not one for each token


def test_a_gpu_prefills_causally_what_a_cpu_does(tmp_path):
    directory = block_checkpoints.make(tmp_path / "model", "NemotronLabsDiffusionModel")
    spans, stored = [CHUNK._replace(start=0, length=16), LATER, OPEN._replace(start=0, length=28)], []

    def prefilled(device):
        harness, rng = Harness(directory, device), np.random.default_rng(0)
        for row in range(3):
            harness.table.fill(row, rng.integers(0, 256, 17).astype(np.int32), 60, harness.spec.mask_id, Decoding())
        harness.runner.step(columns_of(spans))
        return [layer.cpu().float() for layer in (*harness.pool.keys, *harness.pool.values)]

    with fake_gpus():
        stored = prefilled(GPU)
    for found, expected in zip(stored, prefilled(CPU), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
