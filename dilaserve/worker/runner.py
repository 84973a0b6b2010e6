"""One step on one device: rows from the table, one forward pass over their spans, unmasked tokens back to the table."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.models.kvcache import KVPool
from dilaserve.models.layers import Packed, PackedSpan, grouped
from dilaserve.models.llada import Model
from dilaserve.models.spec import ModelSpec
from dilaserve.table import RULES, RequestTable
from dilaserve.terms import RowResult, Span
from dilaserve.worker.groups import Alone, Group
from dilaserve.worker.unmask import Guess, Rules, Sampling, accepted, guess, guess_part

MAX_LOGITS = 2**26  # elements of [masks, vocab] at a time
Array = np.ndarray[Any, np.dtype[np.int64]]


class Columns(NamedTuple):
    """The spans of a batch, each field an array [rows]."""

    row: Array
    generation: Array
    kv_start: Array
    start: Array
    length: Array
    keys: Array
    block_start: Array
    block_end: Array
    quota: Array
    step: Array


class Blocks(NamedTuple):
    """The active blocks of a batch, padded to the widest: [rows, width]."""

    positions: Array
    valid: np.ndarray[Any, np.dtype[np.bool_]]


class Outcome(NamedTuple):
    results: list[RowResult]
    seconds: float
    forward: float


class Runner:
    """Runs an instance's batches as one rank of its TP group, with one model and one K/V pool.

    All ranks read the same rows and have read them before the last collective of a step; behind it rank 0 alone judges
    and writes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: Model,
        pool: KVPool,
        table: RequestTable,
        stop_ids: tuple[int, ...],
        group: Group = Alone(),  # noqa: B008 - has no state
    ) -> None:
        self.spec, self.model, self.pool, self.table, self.group = spec, model, pool, table, group
        self.device = pool.keys[0].device
        self.stop_ids = np.array(stop_ids, dtype=np.int32)

    @torch.inference_mode()
    def step(self, spans: list[Span]) -> Outcome | None:
        """Denoise once. Results come in the order of `spans`; ranks other than 0 have none.

        Raises `Abandoned` when a peer is gone.
        """
        began = time.perf_counter()
        columns = Columns(*np.array(spans, dtype=np.int64).T)
        blocks = active_blocks(columns)
        canvas = self.table.canvas[columns.row[:, None], blocks.positions]
        masked = (canvas == self.spec.mask_id) & blocks.valid
        packed = self.pack(columns)
        entered = time.perf_counter()
        hidden = self.model.hidden(packed, self.pool)
        hidden = hidden[self.on_device(np.flatnonzero(masked[blocks.valid]))]
        guessed = self.guess(hidden, self.sampling(columns, blocks, masked))
        if self.group.rank:
            return None
        taken = accepted(guessed, self.on_device(masked), self.rules(columns)).cpu().numpy()
        left = time.perf_counter()
        confidence = self.write(columns, blocks, masked, taken, guessed)
        results = self.results(columns, blocks, taken, confidence)
        return Outcome(results, time.perf_counter() - began, left - entered)

    def guess(self, hidden: torch.Tensor, sampling: Sampling | None) -> Guess:
        """The candidate of each masked position, [masks], from its hidden state; a slice of the logits at a time."""
        size = max(1, MAX_LOGITS // self.spec.vocab_size)
        if len(hidden) <= size:
            return self.guess_slice(hidden, sampling)
        pieces = []
        for first in range(0, len(hidden), size):
            part = sampling and Sampling(*(knob[first : first + size] for knob in sampling))
            pieces.append(self.guess_slice(hidden[first : first + size], part))
        return Guess(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def guess_slice(self, hidden: torch.Tensor, sampling: Sampling | None) -> Guess:
        logits, mask_id = self.model.logits(hidden), self.spec.mask_id
        if self.group.size == 1:
            return guess(logits, mask_id, sampling)
        return guess_part(logits, self.group, self.model.vocabulary, self.spec.vocab_size, mask_id, sampling)

    def pack(self, columns: Columns) -> Packed:
        """Lay the spans' tokens one after the other, and say which of them the last layer must finish."""
        positions = ranges(columns.start, columns.length)
        ids = self.table.canvas[np.repeat(columns.row, columns.length), positions]
        slots = positions + np.repeat(columns.kv_start, columns.length)
        offsets = starts(columns.length)
        widths = columns.block_end - columns.block_start
        kept = None
        if bool((widths < columns.length).any()):
            kept = self.on_device(ranges(offsets + columns.block_start - columns.start, widths))
        return Packed(
            ids=self.on_device(ids.astype(np.int64)),
            positions=self.on_device(positions),
            slots=self.on_device(slots),
            groups=grouped(packed_spans(offsets, columns.length, columns), self.device),
            kept=kept,
            kept_groups=grouped(packed_spans(starts(widths), widths, columns), self.device) if kept is not None else [],
        )

    def sampling(self, columns: Columns, blocks: Blocks, masked: np.ndarray[Any, Any]) -> Sampling | None:
        """The sampling knobs of each mask, or None when every row is greedy."""
        temperature = self.table.temperature[columns.row]
        if not temperature.any():
            return None
        masks = masked.sum(1)
        knobs = (temperature, self.table.top_p[columns.row], self.table.seed[columns.row], columns.step)
        each = [np.repeat(knob, masks) for knob in knobs]
        return Sampling(*(self.on_device(knob) for knob in (*each, blocks.positions[masked])))

    def rules(self, columns: Columns) -> Rules:
        table, row = self.table, columns.row
        rule = table.rule[row]
        factor = self.on_device(table.factor[row]) if (rule == RULES["factor"]).any() else None
        return Rules(self.on_device(rule), self.on_device(table.threshold[row]), factor, self.on_device(columns.quota))

    def write(
        self,
        columns: Columns,
        blocks: Blocks,
        masked: np.ndarray[Any, Any],
        taken: np.ndarray[Any, Any],
        guessed: Guess,
    ) -> np.ndarray[Any, Any]:
        """Put the accepted tokens on their canvases; returns the confidence spent per row, [rows]."""
        chosen = taken[masked]
        token, confidence = guessed.token.cpu().numpy(), guessed.confidence.cpu().numpy()
        rows = np.broadcast_to(columns.row[:, None], taken.shape)[taken]
        positions = blocks.positions[taken]
        self.table.confidence[rows, positions] = confidence[chosen]
        self.table.canvas[rows, positions] = token[chosen]
        spent: np.ndarray[Any, Any] = np.zeros(taken.shape)
        spent[taken] = confidence[chosen]
        return np.asarray(spent.sum(1))

    def results(
        self, columns: Columns, blocks: Blocks, taken: np.ndarray[Any, Any], confidence: np.ndarray[Any, Any]
    ) -> list[RowResult]:
        canvas = self.table.canvas[columns.row[:, None], blocks.positions]
        masked = (canvas == self.spec.mask_id) & blocks.valid
        stops = (canvas[..., None] == self.stop_ids).any(-1) & blocks.valid
        prefix = np.where(masked.any(1), columns.block_start + masked.argmax(1), columns.block_end)
        stop_at = np.where(stops.any(1), columns.block_start + stops.argmax(1), -1)
        fields = (columns.row, columns.generation, taken.sum(1), masked.sum(1), prefix, stop_at, confidence)
        return [RowResult(*values) for values in zip(*(field.tolist() for field in fields), strict=True)]

    def on_device(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def active_blocks(columns: Columns) -> Blocks:
    widths = columns.block_end - columns.block_start
    column = np.arange(widths.max())
    valid = column < widths[:, None]
    return Blocks(np.where(valid, columns.block_start[:, None] + column, 0), valid)


def packed_spans(offsets: Array, lengths: Array, columns: Columns) -> list[PackedSpan]:
    fields = (offsets, lengths, columns.kv_start, columns.keys)
    return [PackedSpan(*values) for values in zip(*(field.tolist() for field in fields), strict=True)]


def starts(lengths: Array) -> Array:
    return np.cumsum(lengths) - lengths


def ranges(first: Array, lengths: Array) -> Array:
    """`first[0], first[0] + 1, … (lengths[0] of them), first[1], …`"""
    return np.arange(lengths.sum()) + np.repeat(first - starts(lengths), lengths)
