"""The request table: every row's canvas and knobs, in memory that the engine and all workers map.

Knows the layout and nothing of what the numbers mean. A structure of arrays; each column has one writer at a time: the
engine fills a row before its first step and owns the knobs, afterwards canvas and confidence belong to the row's
instance, as long as the row's generation is the one that the step was launched with.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from dilaserve.system.shared_memory import SharedBytes
from dilaserve.types import MAX_STOP_IDS, Decoding, Ending

RULES = {
    "threshold": 0,
    "steps": 1,
    "factor": 2,
    "dynamic": 3,
    "sequential": 4,
    "entropy": 5,
    "margin": 6,
    "entropy-bound": 7,
}
NO_TOKEN = -1  # fills up a row's end tokens
ALIGNMENT = 64  # bytes; a column starts on a cache line of its own


PER_POSITION = 0  # as a column's width: one value for each canvas position


class Column(NamedTuple):
    name: str
    dtype: str
    width: int = 1  # values of a row, or `PER_POSITION`


COLUMNS = (
    Column("canvas", "int32", PER_POSITION),  # token ids; ~id where a mask stands for a token that is known
    Column("confidence", "float32", PER_POSITION),  # of each token when it was unmasked; 0 where none was
    Column("generation", "int64"),
    Column("known", "bool"),  # masks stand for known tokens, which are judged in place of what the model prefers
    Column("resumed", "bool"),  # masks stand for known tokens, which are put there when their positions are unmasked
    Column("rule", "int32"),
    Column("threshold", "float64"),  # reached by what is unmasked
    Column("exceeds", "bool"),  # of a row whose confidences must be above its threshold, which is then the next number
    Column("editing_threshold", "float64"),  # reached by what replaces a token; infinite where nothing does
    Column("factor", "float64"),
    Column("num_denoising_steps", "int32"),  # of each block at most, where blocks begin as noise
    Column("temperature", "float32"),
    Column("top_p", "float32"),
    Column("top_k", "int32"),  # 0: no limit
    Column("min_p", "float32"),
    Column("seed", "int64"),
    Column("top_logprobs", "int32"),  # alternatives that are reported of each token
    Column("ignore_eos", "bool"),
    Column("stop_ids", "int32", MAX_STOP_IDS),  # end tokens beside the model's, then `NO_TOKEN`
    Column("may_end_at", "int32"),  # the first canvas position at which an end token may stand
)


class RequestTable:
    """`rows` rows of `length` canvas positions over one shared buffer, as numpy columns.

    Pickling it (to a child process) shares the memory, it does not copy it.
    """

    canvas: np.ndarray[Any, np.dtype[np.int32]]  # [rows, length]
    confidence: np.ndarray[Any, np.dtype[np.float32]]  # [rows, length]
    generation: np.ndarray[Any, np.dtype[np.int64]]  # [rows], as are the rest
    known: np.ndarray[Any, np.dtype[np.bool_]]
    resumed: np.ndarray[Any, np.dtype[np.bool_]]
    rule: np.ndarray[Any, np.dtype[np.int32]]
    threshold: np.ndarray[Any, np.dtype[np.float64]]
    exceeds: np.ndarray[Any, np.dtype[np.bool_]]
    editing_threshold: np.ndarray[Any, np.dtype[np.float64]]
    factor: np.ndarray[Any, np.dtype[np.float64]]
    num_denoising_steps: np.ndarray[Any, np.dtype[np.int32]]
    temperature: np.ndarray[Any, np.dtype[np.float32]]
    top_p: np.ndarray[Any, np.dtype[np.float32]]
    top_k: np.ndarray[Any, np.dtype[np.int32]]
    min_p: np.ndarray[Any, np.dtype[np.float32]]
    seed: np.ndarray[Any, np.dtype[np.int64]]
    top_logprobs: np.ndarray[Any, np.dtype[np.int32]]
    ignore_eos: np.ndarray[Any, np.dtype[np.bool_]]
    stop_ids: np.ndarray[Any, np.dtype[np.int32]]  # [rows, MAX_STOP_IDS]
    may_end_at: np.ndarray[Any, np.dtype[np.int32]]

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
        ending: Ending = Ending(),  # noqa: B008 - frozen
        answer: np.ndarray[Any, Any] | None = None,
        judged: bool = True,
    ) -> int:
        """Lay out a new request in a free row; returns the row's new generation number. Behind the prompt stand masks,
        or an `answer` of which some is known: tokens, ~token where one is masked, and masks. `judged`: the masked
        tokens are judged as they are put back; else positions are unmasked by what the model prefers, as if none was
        known.

        The generation goes first: a step of the row's last request, if one is still under way, writes nothing after it.
        """
        self.generation[row] += 1
        self.canvas[row, : len(prompt)] = prompt
        self.canvas[row, len(prompt) : canvas_tokens] = mask_id if answer is None else answer
        hidden = answer is not None and bool((answer < 0).any())
        self.known[row], self.resumed[row] = hidden and judged, hidden and not judged
        self.confidence[row, :canvas_tokens] = 0.0
        self.rule[row] = RULES[decoding.rule]
        self.exceeds[row] = decoding.traits.exceeds
        self.set_threshold(row, decoding.confidence_threshold)
        edits = decoding.editing_threshold
        self.editing_threshold[row] = math.inf if edits is None else self.reached(row, edits)
        self.factor[row] = decoding.factor
        self.num_denoising_steps[row] = min(decoding.num_denoising_steps, 2**31 - 1)
        self.temperature[row] = decoding.temperature
        self.top_p[row] = decoding.top_p
        self.top_k[row] = decoding.top_k
        self.min_p[row] = decoding.min_p
        self.seed[row] = decoding.seed
        self.top_logprobs[row] = decoding.top_logprobs
        self.ignore_eos[row] = ending.ignore_eos
        self.stop_ids[row] = NO_TOKEN
        self.stop_ids[row, : len(ending.stop_ids)] = ending.stop_ids
        self.may_end_at[row] = len(prompt) + ending.min_tokens
        return int(self.generation[row])

    def set_threshold(self, row: int, threshold: float) -> None:
        """From its next step on the row unmasks what reaches the threshold, or exceeds it if its family wants that."""
        self.threshold[row] = self.reached(row, threshold)

    def reached(self, row: int, threshold: float) -> float:
        """What confidences of the row have to reach, so that they exceed the threshold if its family wants that."""
        return math.nextafter(threshold, math.inf) if self.exceeds[row] else threshold

    def unmask(
        self,
        row: np.ndarray[Any, Any],
        generation: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        chosen: np.ndarray[Any, np.dtype[np.bool_]],
        token: np.ndarray[Any, Any],
        confidence: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Put the `chosen` tokens of a step on the canvases; the one way in which a worker writes to the table.

        A row whose generation has moved on since the step was launched stays as it is: it is another request's now.
        `row` and `generation` are [rows], the others [rows, width]. Returns which tokens were written, [rows, width].
        """
        written: np.ndarray[Any, np.dtype[np.bool_]] = chosen & (self.generation[row] == generation)[:, None]
        rows, places = np.broadcast_to(row[:, None], written.shape)[written], positions[written]
        self.confidence[rows, places] = confidence[written]
        self.canvas[rows, places] = token[written]
        return written


def private_bytes(size: int) -> torch.Tensor:
    """Zeros that nobody else maps; memory is taken where they are written."""
    return torch.from_numpy(np.zeros(size, dtype=np.uint8))


def nbytes(rows: int, length: int) -> int:
    return sum(padded(extent(column, rows, length)[1]) for column in COLUMNS)


def extent(column: Column, rows: int, length: int) -> tuple[tuple[int, ...], int]:
    width = length if column.width == PER_POSITION else column.width
    shape = (rows,) if column.width == 1 else (rows, width)
    return shape, math.prod(shape) * np.dtype(column.dtype).itemsize


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
