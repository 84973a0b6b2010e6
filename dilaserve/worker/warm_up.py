"""Steps that are run once before the K/V pool is laid out: the largest, so that memory is known and the first full
batch fits, and one of each count of rows that has a graph, so that its kernels are compiled.
"""

import gc
from collections.abc import Callable, Iterable

import numpy as np
import torch

from dilaserve.models.attention import grouped, varlen_for
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed, PackedSpan, Runs, SpanGroup
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.transformer import Model
from dilaserve.types import PAGE
from dilaserve.worker.forward_graphs import ForwardGraphs
from dilaserve.worker.graph_steps import MAX_LOGITS, ReuseSteps
from dilaserve.worker.sampler import Sampling, best_candidates
from dilaserve.worker.step_arrays import Array
from dilaserve.worker.step_buffers import WIDTH

SLACK = 2**28  # bytes, for what the allocator cannot use


def nbytes(spec: ModelSpec, model: Model, tokens: int, rows: int) -> int:
    """Bytes of a CUDA device that steps of `tokens` packed tokens and of `rows` reuse rows need beside weights, K/V."""
    needed = rehearsed(spec, model, tokens, rows)
    gc.collect()  # what was rehearsed refers to itself, and would keep its pool until some later collection
    torch.cuda.empty_cache()
    return needed


@torch.inference_mode()
def rehearsed(spec: ModelSpec, model: Model, tokens: int, rows: int) -> int:
    device, pool = model.weights.norm.device, small_pool(spec, model)
    tokens = max(tokens, spec.max_length)  # a row alone may be longer than a batch
    refresh = peak(device, lambda: refreshed(spec, model, pool, tokens, rows))
    reuse = graphs = 0
    alone = model.weights.held.size == 1  # else no instance is of this device alone, and no step is on fixed buffers
    if alone and not model.waits and spec.noise is None and varlen_for(device, model.weights.norm.dtype, spec.head_dim):
        steps = ReuseSteps(spec, model, pool, rows, eager=True)
        reuse = peak(device, lambda: steps.rehearse(steps.buckets[-1]))
        sizes = steps.graphs.sizes
        graphs = 2 * peak(device, lambda: each(steps.rehearse, sizes))  # a pool that all share, and its holes
        forward = ForwardGraphs(spec, model, pool, tokens, eager=True)
        graphs += 2 * peak(device, lambda: each(forward.graphs.rehearse, (forward.most,)))
    return max(refresh, reuse) + graphs + SLACK


def each(run: Callable[[int], None], counts: Iterable[int]) -> None:
    for count in counts:
        run(count)


def peak(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes that `run` needs at its highest, above what is there."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def small_pool(spec: ModelSpec, model: Model) -> KVPool:
    """A pool of one canvas and a page, which all rows of a rehearsal share."""
    norm = model.weights.norm
    tokens = -(-spec.max_length // PAGE) * PAGE + PAGE
    part = Shard(0, spec.kv_heads // (model.groups * model.kv))
    return KVPool(spec, part, torch.zeros(tokens * spec.kv_elements // part.size, dtype=norm.dtype, device=norm.device))


def refreshed(spec: ModelSpec, model: Model, pool: KVPool, tokens: int, rows: int) -> None:
    """A step of `tokens` tokens in canvases as long as can be, and the logits of `rows` blocks, which sample."""
    device, canvas = pool.keys[0].device, min(spec.max_length, tokens)
    lengths = [canvas] * (tokens // canvas) + [tokens % canvas] * (tokens % canvas > 0)
    offsets = np.cumsum([0, *lengths])
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    kept = torch.arange(min(tokens, rows * WIDTH), device=device)
    varlen = varlen_for(device, pool.keys[0].dtype, spec.head_dim) if spec.window is None else None
    packed = Packed(
        ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=positions,
        slots=positions,
        groups=spread(offsets, device, canvas, bool(varlen)),
        kept=kept,
        kept_groups=spread(np.array([0, len(kept)]), device, canvas, bool(varlen)),
    )
    hidden = model.hidden(packed, pool)
    mask_id = min(spec.mask_id, model.vocabulary.stop - model.vocabulary.start - 1)
    for part in torch.split(hidden, max(1, MAX_LOGITS // spec.vocab_size)):
        half, places = torch.full((len(part),), 0.5, device=device), torch.arange(len(part), device=device)
        never = places[:, None]
        knobs = Sampling(half, half, places.int(), half, places, places, places, never, places.clamp(max=mask_id) - 1)
        best_candidates(model.logits(part), mask_id, knobs)


def spread(offsets: Array, device: torch.device, canvas: int, varlen: bool) -> list[SpanGroup] | Runs:
    """Spans between these offsets, all of whose keys are one canvas at the pool's start."""
    lengths = np.diff(offsets).tolist()
    if not varlen:
        spans = [PackedSpan(first, length, 0, canvas) for first, length in zip(offsets.tolist(), lengths, strict=False)]
        return grouped(spans, device)
    count = len(lengths)
    return Runs(
        torch.tensor(offsets, dtype=torch.int32, device=device),
        torch.zeros(count + 1, dtype=torch.int32, device=device),
        torch.full((count,), canvas, dtype=torch.int32, device=device),
        max(lengths),
        canvas,
    )
