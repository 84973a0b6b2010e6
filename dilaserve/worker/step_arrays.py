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
    stage: Array


class Blocks(NamedTuple):
    """The active blocks of a batch, padded to the widest: [rows, width]."""

    positions: Array
    valid: np.ndarray[Any, np.dtype[np.bool_]]


def columns_of(spans: Sequence[Span], stages: Sequence[int] | None = None) -> Columns:
    stage = np.array(stages or [0] * len(spans), dtype=np.int64)
    return Columns(*[*np.array(spans, dtype=np.int64).T, stage])


def active_blocks(columns: Columns) -> Blocks:
    widths = columns.block_end - columns.block_start
    column = np.arange(widths.max())
    valid = column < widths[:, None]
    return Blocks(np.where(valid, columns.block_start[:, None] + column, 0), valid)


def starts(lengths: Array) -> Array:
    return np.cumsum(lengths) - lengths


def ranges(first: Array, lengths: Array) -> Array:
    """`first[0], first[0] + 1, … (lengths[0] of them), first[1], …`"""
    return np.arange(lengths.sum()) + np.repeat(first - starts(lengths), lengths)
