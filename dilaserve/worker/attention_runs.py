"""The runs of attention of a batch: as arrays that are sent to the device, and of what has arrived there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.models.spans import PackedSpan, Runs, SplitRuns
from dilaserve.worker.step_arrays import Array, Columns, SeenRuns, starts, visible_keys


class RunArrays(NamedTuple):
    """Runs of one kind, see `spans.Runs`; `tokens` are theirs of the packed tokens, None if they are all."""

    tokens: Array | None
    offsets: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    keys: np.ndarray[Any, Any]
    most_queries: int
    most_keys: int
    causal: bool

    @property
    def sent(self) -> list[np.ndarray[Any, Any] | None]:
        return [self.tokens, self.offsets, self.starts, self.keys]

    def runs(self, there: Sequence[torch.Tensor]) -> Runs:
        """Of what was `sent`."""
        _, offsets, starts, keys = there
        return Runs(offsets, starts, keys, self.most_queries, self.most_keys, causal=self.causal)


def run_arrays(
    lengths: Array, kv_start: Array, keys: Array, causal: bool = False, tokens: Array | None = None
) -> RunArrays:
    """Runs with so many queries each, one after the other."""
    ends = np.append(0, lengths.cumsum())
    offsets, starts, used = (array.astype(np.int32) for array in (ends, np.append(kv_start, 0), keys))
    return RunArrays(tokens, offsets, starts, used, int(lengths.max()), int(keys.max()), causal)


def split_by_kind(columns: Columns) -> list[RunArrays]:
    """The open runs of a batch and its causal ones, of which either may be all."""
    seen = visible_keys(columns, causal=True)
    if seen.causal.all() or not seen.causal.any():
        return [run_arrays(seen.lengths, columns.kv_start[seen.row], seen.keys, bool(seen.causal.any()))]
    kinds = np.repeat(seen.causal, seen.lengths)
    return [of_kind(columns, seen, causal, np.flatnonzero(kinds == causal)) for causal in (False, True)]


def of_kind(columns: Columns, seen: SeenRuns, causal: bool, tokens: Array) -> RunArrays:
    mine = seen.causal == causal
    return run_arrays(seen.lengths[mine], columns.kv_start[seen.row[mine]], seen.keys[mine], causal, tokens)


def joined(parts: Sequence[RunArrays], there: Sequence[torch.Tensor]) -> Runs | SplitRuns:
    """The runs of a batch, of what was `sent` of its parts, one after the other."""
    if len(parts) == 1:
        return parts[0].runs(there)
    (opened, causal), size = parts, len(parts[0].sent)
    return SplitRuns(there[0], opened.runs(there[:size]), there[size], causal.runs(there[size:]))


def packed_spans(lengths: Array, columns: Columns) -> list[PackedSpan]:
    """The spans with so many queries each, one after the other."""
    fields = (starts(lengths), lengths, columns.kv_start, columns.keys, columns.grain, columns.start - columns.origin)
    spans = [PackedSpan(*values) for values in zip(*(field.tolist() for field in fields), strict=True)]
    return [span for span in spans if span.length]
