"""The request table: every row's canvas and knobs, in memory that the engine and all workers map.

Knows the layout and nothing of what the numbers mean. A structure of arrays; each column has one writer at a time: the
engine fills a row before its first step and owns the knobs, afterwards canvas and confidence belong to the row's
instance.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.sharing import SharedBytes
from dilaserve.terms import Decoding

RULES = {"threshold": 0, "steps": 1, "factor": 2}
ALIGNMENT = 64  # bytes; a column starts on a cache line of its own


class Column(NamedTuple):
    name: str
    dtype: str
    wide: bool  # one value per canvas position, not per row


COLUMNS = (
    Column("canvas", "int32", True),
    Column("confidence", "float32", True),  # of each token when it was unmasked; 0 where none was
    Column("generation", "int64", False),
    Column("rule", "int32", False),
    Column("threshold", "float64", False),
    Column("factor", "float64", False),
    Column("temperature", "float32", False),
    Column("top_p", "float32", False),
    Column("seed", "int64", False),
    Column("ignore_eos", "bool", False),
)


class RequestTable:
    """`rows` rows of `length` canvas positions over one shared buffer, as numpy columns.

    Pickling it (to a child process) shares the memory, it does not copy it.
    """

    canvas: np.ndarray[Any, np.dtype[np.int32]]  # [rows, length]
    confidence: np.ndarray[Any, np.dtype[np.float32]]  # [rows, length]
    generation: np.ndarray[Any, np.dtype[np.int64]]  # [rows], as are the rest
    rule: np.ndarray[Any, np.dtype[np.int32]]
    threshold: np.ndarray[Any, np.dtype[np.float64]]
    factor: np.ndarray[Any, np.dtype[np.float64]]
    temperature: np.ndarray[Any, np.dtype[np.float32]]
    top_p: np.ndarray[Any, np.dtype[np.float32]]
    seed: np.ndarray[Any, np.dtype[np.int64]]
    ignore_eos: np.ndarray[Any, np.dtype[np.bool_]]

    def __init__(self, rows: int, length: int, memory: SharedBytes | torch.Tensor | None = None) -> None:
        self.rows, self.length = rows, length
        self.memory = SharedBytes(nbytes(rows, length)) if memory is None else memory
        self.buffer = self.memory.tensor if isinstance(self.memory, SharedBytes) else self.memory
        raw, offset = self.buffer.numpy(), 0
        for column in COLUMNS:
            shape, size = extent(column, rows, length)
            setattr(self, column.name, raw[offset : offset + size].view(column.dtype).reshape(shape))
            offset += padded(size)

    def __reduce__(self) -> tuple[type["RequestTable"], tuple[int, int, SharedBytes | torch.Tensor]]:
        return RequestTable, (self.rows, self.length, self.memory)

    def fill(
        self,
        row: int,
        prompt: np.ndarray[Any, Any],
        canvas_tokens: int,
        mask_id: int,
        decoding: Decoding,
        ignore_eos: bool = False,
    ) -> int:
        """Lay out a new request in a free row; returns the row's new generation number."""
        self.canvas[row, : len(prompt)] = prompt
        self.canvas[row, len(prompt) : canvas_tokens] = mask_id
        self.confidence[row, :canvas_tokens] = 0.0
        self.rule[row] = RULES[decoding.rule]
        self.threshold[row] = decoding.confidence_threshold
        self.factor[row] = decoding.factor
        self.temperature[row] = decoding.temperature
        self.top_p[row] = decoding.top_p
        self.seed[row] = decoding.seed
        self.ignore_eos[row] = ignore_eos
        self.generation[row] += 1
        return int(self.generation[row])


def private_bytes(size: int) -> torch.Tensor:
    """Zeros that nobody else maps; memory is taken where they are written."""
    return torch.from_numpy(np.zeros(size, dtype=np.uint8))


def nbytes(rows: int, length: int) -> int:
    return sum(padded(extent(column, rows, length)[1]) for column in COLUMNS)


def extent(column: Column, rows: int, length: int) -> tuple[tuple[int, ...], int]:
    shape = (rows, length) if column.wide else (rows,)
    return shape, math.prod(shape) * np.dtype(column.dtype).itemsize


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
