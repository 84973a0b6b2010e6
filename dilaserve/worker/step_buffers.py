"""The fixed buffers of a step, and what works on them: values and signatures."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dilaserve.types import PAGE
from dilaserve.worker.candidates import Candidates

WIDTH = PAGE  # queries of a row; rows with more take the other way
DEPTH = 2  # steps whose results are not read yet, at most
FIELDS = ("kv_start", "keys", "start", "length", "first", "end", "shift", "rule", "quota", "threshold", "factor")
REALS = 2  # of the fields, at the end


class Buffers(NamedTuple):
    """Where a step finds its rows and leaves what it did, all on the device.

    A row of `batch` is the canvas of its queries, positions `[start, start + length)`, and then `FIELDS`. Masks are
    filled in the columns `[first, end)` alone, each by the candidate of the column `shift` before it.
    """

    batch: torch.Tensor  # int64 [rows, WIDTH + fields]
    found: torch.Tensor  # int32 [DEPTH, rows, 2, WIDTH], as `sampler.encoded` says it
    turn: torch.Tensor  # int64 [1], where in `found` the result of the last step lies


class Laid(NamedTuple):
    """The tokens of a step one after the other, and the runs of keys that its rows see."""

    ids: torch.Tensor  # int64 [rows · WIDTH]
    positions: torch.Tensor  # int64 [rows · WIDTH]
    slots: torch.Tensor  # int64 [rows · WIDTH], pool token of each
    starts: torch.Tensor  # int32 [rows + 1], pool token of each row's first key; the last says nothing
    keys: torch.Tensor  # int32 [rows]


class StepKernels(NamedTuple):
    """See the functions of these names."""

    lay_out: Callable[[Buffers, int, int], Laid]
    unmask: Callable[[Buffers, int, int, Candidates], None]
