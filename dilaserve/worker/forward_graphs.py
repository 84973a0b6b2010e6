"""Forward passes of small steps with refresh rows, replayed as CUDA graphs.

Launching the kernels of a step of LLaDA-8B one by one takes a host 10 to 18 ms, whatever the step computes; a GPU that
needs less waits for the host. Here tokens are padded to a multiple of `STRIDE` and runs to `SPANS`, so that few graphs
serve all layouts. What pads is a span of its own over the pool's spare page. On a CPU the same function runs as it is.
"""

from typing import Any

import numpy as np
import torch

from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed, Runs
from dilaserve.models.spec import ModelSpec
from dilaserve.models.transformer import Model
from dilaserve.types import PAGE
from dilaserve.worker.cuda_graphs import Graphs
from dilaserve.worker.step_arrays import Array, Columns, visible_keys

STRIDE = 64  # packed tokens between two sizes
TOKENS = 768  # of the largest size; a larger step computes for longer than its launches take
SPANS = 32  # runs of queries that see alike of a step, at most; a row is one, or with a grain several
INDICES = 3  # rows of `longs`: token ids, positions, pool tokens


class ForwardGraphs:
    """For steps of a group of one; all layers compute every token, of which the caller takes what it wants."""

    def __init__(self, spec: ModelSpec, model: Model, pool: KVPool, tokens: int, eager: bool = False) -> None:
        """`tokens` are those of the largest step."""
        self.spec, self.model, self.pool = spec, model, pool
        self.device = device = pool.keys[0].device
        sizes = range(STRIDE, max(STRIDE, min(tokens, TOKENS)) + 1, STRIDE)
        self.most = sizes[-1]
        self.longs = torch.zeros(INDICES * self.most, dtype=torch.int64, device=device)  # [INDICES, size] of each graph
        self.ints = torch.zeros(3, SPANS + 2, dtype=torch.int32, device=device)  # ends, starts and keys of the spans
        self.out = torch.zeros(self.most, spec.hidden, dtype=pool.keys[0].dtype, device=device)
        self.graphs = Graphs(device, sizes, self.forward, self.clear, "packed tokens", eager)

    def takes(self, columns: Columns) -> bool:
        fits = len(columns.row) <= SPANS and int(columns.length.sum()) <= self.most
        return fits and len(visible_keys(columns).row) <= SPANS

    def laid_out(self, ids: Array, positions: Array, slots: Array, columns: Columns) -> list[np.ndarray[Any, Any]]:
        """What `hidden` wants on the device: the tokens and the spans of the step, padded."""
        return self.padded(ids, positions, slots, columns, max(STRIDE, -(-len(ids) // STRIDE) * STRIDE))

    def padded(
        self, ids: Array, positions: Array, slots: Array, columns: Columns, size: int
    ) -> list[np.ndarray[Any, Any]]:
        seen = visible_keys(columns)
        tokens, runs = len(ids), len(seen.row)
        padding = np.arange(size - tokens) % PAGE
        longs, ints = np.zeros((INDICES, size), dtype=np.int64), np.zeros((3, SPANS + 2), dtype=np.int32)
        longs[:, :tokens] = ids, positions, slots
        longs[1:, tokens:] = padding, self.pool.spare + padding
        ints[0, 1:] = size
        ints[0, 1 : runs + 1] = seen.lengths.cumsum()
        ints[1, :runs], ints[1, runs] = columns.kv_start[seen.row], self.pool.spare
        ints[2, :runs], ints[2, runs] = seen.keys, PAGE
        return [longs, ints]

    def hidden(self, longs: torch.Tensor, ints: torch.Tensor) -> torch.Tensor:
        """Final hidden states of a step from `laid_out`, [padded tokens, hidden]; the next step overwrites them."""
        size = longs.shape[1]
        self.graphs.make_ready(size)
        self.fill(longs, ints)
        self.graphs.replay(size)
        return self.out[:size]

    def fill(self, longs: torch.Tensor, ints: torch.Tensor) -> None:
        self.longs[: longs.numel()].copy_(longs.flatten())
        self.ints.copy_(ints)

    def forward(self, size: int) -> None:
        ids, positions, slots = self.longs[: INDICES * size].view(INDICES, size)
        ends, starts, keys = self.ints
        runs = Runs(ends, starts, keys[: SPANS + 1], size, self.spec.max_length)
        self.out[:size] = self.model.hidden(Packed(ids, positions, slots, runs, None, []), self.pool)

    def clear(self, size: int) -> None:
        """Fill the buffers with a step of this size that is padding alone."""
        nothing = np.zeros(0, dtype=np.int64)
        columns = Columns(*[nothing] * len(Columns._fields))
        self.fill(*map(torch.from_numpy, self.padded(nothing, nothing, nothing, columns, size)))
