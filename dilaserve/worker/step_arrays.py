"""A batch as arrays: its spans by column, and the active blocks of its rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dilaserve.types import Span

Array = np.ndarray[Any, np.dtype[np.int64]]


class Columns(NamedTuple):
    """The spans of a batch, each field an array [rows], and the stages of their rows in the launch (see `Courses`)."""

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
    grain: Array
    origin: Array
    shift: Array
    stage: Array

    @property
    def seen(self) -> tuple[Array, ...]:
        """What says which keys the queries see."""
        return self.start, self.length, self.keys, self.grain, self.origin


class Blocks(NamedTuple):
    """Positions by row, of the active blocks or of all queries of a batch, padded to the widest: [rows, width]."""

    positions: Array
    valid: np.ndarray[Any, np.dtype[np.bool_]]


class SeenRuns(NamedTuple):
    """Runs of queries that see alike, in the order of the packed tokens: row, queries and keys of each, [runs].

    Of `causal` ones the last query sees all keys, each one before it a key less than the next.
    """

    row: Array
    lengths: Array
    keys: Array
    causal: np.ndarray[Any, np.dtype[np.bool_]]


def columns_of(spans: Sequence[Span], stages: Sequence[int] | None = None) -> Columns:
    stage = np.array(stages or [0] * len(spans), dtype=np.int64)
    return Columns(*[*np.array(spans, dtype=np.int64).T, stage])


def active_blocks(columns: Columns) -> Blocks:
    return padded(columns.block_start, columns.block_end - columns.block_start)


def queries(columns: Columns) -> Blocks:
    return padded(columns.start, columns.length)


def padded(first: Array, widths: Array) -> Blocks:
    column = np.arange(max(1, widths.max()))
    valid = column < widths[:, None]
    return Blocks(np.where(valid, first[:, None] + column, 0), valid)


def kept_tokens(columns: Columns) -> Array:
    """The packed tokens whose logits the rows want, row by row: of each active position, or the one before it.

    A row's first query stands in where the one before is no query: such a position has no mask.
    """
    widths = columns.block_end - columns.block_start
    places = ranges(columns.block_start - columns.shift - columns.start, widths)
    return np.maximum(places, 0) + np.repeat(starts(columns.length), widths)


def visible_keys(columns: Columns, causal: bool = False) -> SeenRuns:
    """Runs of queries that see alike. A span is one without a `grain`, else one for each grain before its origin, and
    one from there on. With `causal` grains of a token are a run of their own kind, instead of one each.
    """
    rows, lengths, keys, kinds = [], [], [], []
    if not columns.grain.any():
        return SeenRuns(np.arange(len(columns.row)), columns.length, columns.keys, np.zeros(len(columns.row), bool))
    for row, (start, length, end, grain, origin) in enumerate(
        zip(*(field.tolist() for field in columns.seen), strict=True)
    ):
        first, last = start, start + length
        while first < last:
            grained = grain and first < origin
            whole = bool(causal and grained and grain == 1)
            stop = min(last, origin if whole else first + grain - (first - origin) % grain) if grained else last
            rows.append(row)
            lengths.append(stop - first)
            keys.append(min(stop, end) if grained else end)
            kinds.append(whole)
            first = stop
    return SeenRuns(np.array(rows), np.array(lengths), np.array(keys), np.array(kinds))


def starts(lengths: Array) -> Array:
    return np.cumsum(lengths) - lengths


def ranges(first: Array, lengths: Array) -> Array:
    """`first[0], first[0] + 1, … (lengths[0] of them), first[1], …`"""
    return np.arange(lengths.sum()) + np.repeat(first - starts(lengths), lengths)
