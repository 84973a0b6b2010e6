"""The open block of an answer after a step, as its client sees it: tokens, masks, confidences."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from dilaserve.tokenizer.detokenizer import Detokenizer
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import Denoised, StepKind

CONTEXT = 16  # tokens of the answer before the block on which its first pieces may depend: parts of a character, spaces


class Canvas(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the open block that belongs to the answer, after a step. Nothing of it is final before the block is.

    `tokens` holds a piece of text for each position, `""` for special tokens and for all but the last token of a
    character, and None where a mask is. `confidences` are the tokens' probabilities when they were unmasked, None for
    masks. `start` is the first position, counted from the answer's first token; `block` counts from 0, `step` from 1
    over the whole answer. `kind` is `commit` for the step that ends the block, else `refresh` or `reuse`; `refresh`
    says of either whether the step has rewritten K/V. `seconds` from the request's arrival to the end of the step.
    `threshold` is the one that was in force, None under decode rules without one.
    """

    step: int
    kind: StepKind
    refresh: bool
    seconds: float
    block: int
    start: int
    tokens: tuple[str | None, ...]
    confidences: tuple[float | None, ...]
    threshold: float | None

    @property
    def masked(self) -> tuple[bool, ...]:
        return tuple(token is None for token in self.tokens)


class Snapshot(NamedTuple):
    """The block as it stood in the table; its text is made only if somebody reads it."""

    about: Denoised
    seconds: float
    context: list[int]  # the answer's tokens before it, `CONTEXT` at most
    ids: list[int]
    confidences: list[float]


def snapshot(table: RequestTable, about: Denoised, now: float) -> Snapshot:
    """Copy the block, whose step has just ended, out of the table. Later steps of its launch may have been at it."""
    request, start, end = about.request, about.start, about.end
    row, first = request.row, max(request.prompt_tokens, start - CONTEXT)
    return Snapshot(
        about,
        now - request.arrived_at,
        table.canvas[row, first:start].tolist(),
        table.canvas[row, start:end].tolist(),
        table.confidence[row, start:end].tolist(),
    )


def drawn(taken: Snapshot, text: Text, mask_id: int) -> Canvas:
    """The canvas that a snapshot shows. Raises `RequestFailed` if the tokenizer fails."""
    about, ids = taken.about, taken.ids
    sure = zip(ids, taken.confidences, strict=True)
    return Canvas(
        step=about.step,
        kind=about.kind,
        refresh=about.refresh,
        seconds=round(taken.seconds, 6),
        block=about.block,
        start=about.start - about.request.prompt_tokens,
        tokens=tuple(pieces(taken.context, ids, text, mask_id)),
        confidences=tuple(None if is_mask(id, mask_id) else round(confidence, 4) for id, confidence in sure),
        threshold=about.threshold,
    )


def is_mask(id: int, mask_id: int) -> bool:
    """Whether a position is masked, that of a known token too."""
    return id == mask_id or id < 0


def pieces(context: Sequence[int], ids: Sequence[int], text: Text, mask_id: int) -> Iterator[str | None]:
    """The text of each token, None for masks. Tokens without a mask between them are read together."""
    run = Detokenizer(text)
    for id in context:  # one by one, as else the first of them would come again behind part of a character
        run.push([id])
    for id in ids:
        if is_mask(id, mask_id):
            run = Detokenizer(text)
            yield None
        else:
            yield run.push([id])
