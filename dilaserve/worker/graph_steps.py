"""A step of reuse rows alone, on buffers that stay where they are: the same work whoever is in it; a graph replays it.

Rows are padded to one of a few counts, their queries to a page; what pads writes to the pool's spare page and unmasks
nothing. Rows without masks are frozen. The canvas of the queries stays on the device from step to step, and the host
may read a step's result while the next one runs. On a CPU the same function runs as it is.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed, Runs
from dilaserve.models.spec import ModelSpec
from dilaserve.models.transformer import Model
from dilaserve.transport.request_table import RequestTable
from dilaserve.worker.candidates import Candidates
from dilaserve.worker.confidence import best
from dilaserve.worker.cuda_graphs import Graphs
from dilaserve.worker.sampler import BY_CONFIDENCE
from dilaserve.worker.step_arrays import Blocks, Columns, queries
from dilaserve.worker.step_buffers import DEPTH, FIELDS, WIDTH, Buffers
from dilaserve.worker.step_kernels import step_kernels_for

MAX_LOGITS = 2**26  # elements of [positions, vocab] at a time
STRIDE = 2  # of the counts to which batches are padded; two blocks fill the smallest tile of a product
GRAPHS = (1, *range(STRIDE, 33, STRIDE))  # rows; beyond, a step computes for longer than its launches take a host


class StepResult(NamedTuple):
    """What a step did, by row and active position, [rows, width] each."""

    token: np.ndarray[Any, Any]  # -1 where nothing was unmasked
    confidence: np.ndarray[Any, Any]


class ReuseSteps:
    """Steps of up to `rows` rows of a group of one. `eager`: without CUDA graphs.

    `load` a batch, then `launch` as often as wanted and `read` each result in order, at most `DEPTH` behind.
    """

    def __init__(self, spec: ModelSpec, model: Model, pool: KVPool, rows: int, eager: bool = False) -> None:
        self.spec, self.model, self.pool = spec, model, pool
        self.device = pool.keys[0].device
        self.cuda = self.device.type == "cuda"
        self.buckets = buckets(rows)
        most, device = self.buckets[-1], self.device
        self.staged = torch.zeros(most, WIDTH + len(FIELDS), dtype=torch.int64, pin_memory=self.cuda)
        self.landed = torch.zeros(DEPTH, most, 2, WIDTH, dtype=torch.int32, pin_memory=self.cuda)
        self.buffers = Buffers(
            batch=torch.zeros(self.staged.shape, dtype=torch.int64, device=device),
            found=torch.zeros(self.landed.shape, dtype=torch.int32, device=device),
            turn=torch.full((1,), DEPTH - 1, dtype=torch.int64, device=device),
        )
        self.kernels = step_kernels_for(device)
        self.offsets = torch.arange(0, WIDTH * (most + 1), WIDTH, dtype=torch.int32, device=device)
        sizes = [size for size in self.buckets if size <= GRAPHS[-1]]
        self.graphs = Graphs(device, sizes, self.step, self.pad, "rows", eager)
        if self.cuda:
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.computed, self.arrived = ([torch.cuda.Event() for _ in range(DEPTH)] for _ in range(2))  # type: ignore[no-untyped-call]
        self.bucket = self.launched = self.seen = 0
        self.columns = np.zeros((0, 1), dtype=np.int64)  # where active positions are staged, [rows, width]; -1: none

    def takes(self, columns: Columns, table: RequestTable) -> bool:
        """Whether all rows are greedy and ask for no more than that, with at most a page of queries that see alike, and
        masks only among these, where answers may end.
        """
        return bool(
            len(columns.row) <= self.buckets[-1]
            and (columns.start <= columns.block_start).all()
            and (columns.block_start < columns.block_end).all()
            and (columns.block_end <= columns.start + columns.length).all()
            and columns.length.max() <= WIDTH
            and not columns.grain.any()
            and not table.temperature[columns.row].any()
            and not table.top_logprobs[columns.row].any()
            and not (table.known[columns.row] | table.resumed[columns.row]).any()
            and (table.rule[columns.row] <= BY_CONFIDENCE).all()
            and np.isinf(table.editing_threshold[columns.row]).all()
            and (columns.block_start >= table.may_end_at[columns.row]).all()
        )

    def load(self, columns: Columns, blocks: Blocks, table: RequestTable) -> None:
        """Put a batch that `takes` allows, and its active blocks, in place; what was launched before must have been
        read.
        """
        rows, asked = len(columns.row), queries(columns)
        first = columns.block_start - columns.start
        self.columns = np.where(blocks.valid, blocks.positions - columns.start[:, None], -1)
        self.bucket = next(size for size in self.buckets if size >= rows)
        self.make_ready(self.bucket)
        staged = self.staged.numpy()
        self.clear(staged[rows : self.bucket])
        staged[:rows, : asked.positions.shape[1]] = table.canvas[columns.row[:, None], asked.positions]
        whole = (
            columns.kv_start,
            columns.keys,
            columns.start,
            columns.length,
            first,
            columns.block_end - columns.start,
            columns.shift,
            table.rule[columns.row],
            columns.quota,
        )
        for i, values in enumerate(whole, WIDTH):
            staged[:rows, i] = values
        real = staged.view(np.float64)
        real[:rows, -2], real[:rows, -1] = table.threshold[columns.row], table.factor[columns.row]
        self.buffers.batch[: self.bucket].copy_(self.staged[: self.bucket], non_blocking=True)

    def clear(self, staged: np.ndarray[Any, Any]) -> None:
        """Make padding of rows of the staging buffer."""
        staged[:] = 0
        staged[:, WIDTH], staged[:, WIDTH + 1] = self.pool.spare, WIDTH

    def launch(self) -> None:
        """Begin the next step of the batch."""
        slot = self.launched % DEPTH
        self.launched += 1
        self.graphs.replay(self.bucket)
        if not self.cuda:
            self.landed[slot].copy_(self.buffers.found[slot])
            return
        self.computed[slot].record()
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(self.computed[slot])
            self.landed[slot, : self.bucket].copy_(self.buffers.found[slot, : self.bucket], non_blocking=True)
            self.arrived[slot].record()

    def read(self) -> StepResult:
        """Wait for the oldest step whose result was not read."""
        slot = self.seen % DEPTH
        self.seen += 1
        if self.cuda:
            self.arrived[slot].synchronize()
        landed = self.landed[slot, : len(self.columns)].numpy()
        token, confidence = (np.take_along_axis(landed[:, i], self.columns, 1) for i in range(2))
        return StepResult(np.where(self.columns < 0, -1, token), confidence.view(np.float32))

    def step(self, rows: int) -> None:
        """Denoise the first `rows` rows of the batch once: a function of the buffers, without a look at the host."""
        ids, positions, slots, starts, keys = self.kernels.lay_out(self.buffers, rows, self.pool.spare)
        runs = Runs(self.offsets[: rows + 1], starts, keys, WIDTH, self.spec.max_length, even=True)
        packed = Packed(ids, positions, slots, runs, None, [])
        candidates = self.candidates(self.model.hidden(packed, self.pool))
        self.kernels.unmask(self.buffers, rows, self.spec.mask_id, candidates)

    def candidates(self, hidden: torch.Tensor) -> Candidates:
        """The candidate of each position, a slice of the logits at a time."""
        size = max(1, MAX_LOGITS // self.spec.vocab_size)
        pieces = [best(self.model.logits(part), self.spec.mask_id) for part in torch.split(hidden, size)]
        return Candidates(*(torch.cat(parts) for parts in zip(*pieces, strict=True))) if len(pieces) > 1 else pieces[0]

    def make_ready(self, rows: int) -> None:
        if self.graphs.make_ready(rows):
            self.buffers.turn.fill_(DEPTH - 1)
            self.launched = self.seen = 0

    def rehearse(self, rows: int) -> None:
        """Run the step on padding alone."""
        self.graphs.rehearse(rows)

    def pad(self, rows: int) -> None:
        """Make the first rows of the batch padding."""
        self.clear(self.staged.numpy()[:rows])
        self.buffers.batch[:rows].copy_(self.staged[:rows])


def buckets(rows: int) -> list[int]:
    """Counts to which batches of up to so many rows are padded."""
    return [1, *range(STRIDE, rows + STRIDE, STRIDE)] if rows > 1 else [1]
