"""Steps: what one batch asks of an instance, and what it reports. Values only."""

from typing import Literal, NamedTuple

import msgspec

StepKind = Literal["refresh", "reuse", "commit"]  # rewrites K/V that are kept; reuses them; the last of its block


class Span(NamedTuple):
    """One row's part of a step; positions count from the start of its canvas.

    Queries are positions `[start, start + length)`; they see the row's first `keys` positions, whose K/V lie in the
    pool from token `kv_start` on. With a `grain` a query before `origin` sees no further than the end of its own run
    of so many positions, which are counted from there (1: causal); those from `origin` on, the open block's, see all
    keys. Masks are filled in `[block_start, block_end)` only, each by the logits of the position `shift` before it.
    `quota` is the number of tokens to unmask under the rules that count; `step` numbers the steps of these positions,
    for the row's random stream.
    """

    row: int
    generation: int
    kv_start: int
    start: int
    length: int
    keys: int
    block_start: int
    block_end: int
    quota: int
    step: int
    grain: int = 0
    origin: int = 0
    shift: int = 0


class Copy(NamedTuple):
    """K/V of `tokens` tokens of an instance's pool, to be copied from `source` to `target`; they may overlap."""

    source: int
    target: int
    tokens: int


class Alternatives(NamedTuple):
    """The most probable tokens of a canvas position in the step that unmasked it, the best first; the mask token is
    none of them. Log probabilities are those of the whole softmax.
    """

    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class TimedStep(NamedTuple):
    """A step that a row has taken part in: when it began, by the engine's clock, and the seconds that it took."""

    kind: StepKind
    began_at: float
    seconds: float


class RowResult(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one step did to one row.

    `prefix` is the first position of the active block still masked (its end if none), `stop_at` the first stop token
    in the block (-1 if none counts), `confidence` the sum over the tokens unmasked.

    `alternatives` of the tokens unmasked, for rows that ask for `top_logprobs`.

    `edited`: those of the unmasked tokens that were no masks before, where tokens may be replaced.

    `stage` says what the step was: the row's first span in the batch (0) or one that follows it (n + 1: the n-th of its
    `then`). `rested`: an earlier step of the batch has done the block, so that the row took no part.
    """

    row: int
    generation: int
    unmasked: int
    masks_left: int
    prefix: int
    stop_at: int
    confidence: float
    stage: int = 0
    rested: bool = False
    edited: int = 0
    alternatives: tuple[Alternatives, ...] = ()


class Batch(msgspec.Struct, frozen=True, gc=False):
    """The rows that share a forward pass on one instance, and others after it, up to `steps` in all; there is a
    `StepDone` for each.

    `then` are the spans that follow each row's first, if `steps` is more than 1: the next one is taken up after a step,
    or when the block is done if it is of another block. The batch ends with a step after which a row has none, or no
    mask before a stop token, or all together too many tokens for a step. Another may have begun by then, in which a row
    whose block is done rests. `copies` are made before the first step, one after the other.
    """

    id: int
    instance: int
    spans: tuple[Span, ...]
    steps: int = 1
    then: tuple[tuple[Span, ...], ...] = ()
    copies: tuple[Copy, ...] = ()
