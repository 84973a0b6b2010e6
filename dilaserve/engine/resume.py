"""An answer that goes on behind tokens which its client has: where they stand, what they say, whether they end it.

The grid of blocks is that of the whole answer.

1. Blocks that the tokens fill are taken as they are.
2. The open block is decoded again from masks. Its tokens stand there as ~token, and are put back when their positions
   are unmasked. Its first step is a refresh, and draws depend on the steps of the block: so its steps, and the tokens
   behind, are those that they were.
3. The text takes the tokens in before the first new one comes, so that it goes on where it was.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from dilaserve.engine.answer_text import AnswerText, cutting
from dilaserve.engine.prompts import token_ids
from dilaserve.engine.submit import Options, ResolvedOptions
from dilaserve.errors import BadRequest
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.types import FinishReason

Ids = np.ndarray[Any, np.dtype[np.int32]]  # [tokens]
NAME = "resume_token_ids"


class Vocabulary(NamedTuple):
    """What the engine knows of the model's tokens; `stop_ids` end answers."""

    size: int
    mask_id: int
    stop_ids: tuple[int, ...] = ()


class Resumed(NamedTuple):
    """`tokens` [tokens] that the client has, of them `whole` in blocks that they fill. `text` has taken them in.

    `ended`: how they end the answer; None if it goes on.
    """

    tokens: Ids
    whole: int
    text: AnswerText
    ended: FinishReason | None = None

    @property
    def final(self) -> Ids:
        """The tokens of whole blocks."""
        return self.tokens[: self.whole]

    def canvas(self, length: int, mask_id: int) -> Ids | None:
        """What stands in the row's `length` positions behind the prompt, as the request table has it; None: masks."""
        if not len(self.tokens):
            return None
        canvas = np.full(length, mask_id, dtype=np.int32)
        canvas[: len(self.tokens)] = ~self.tokens
        canvas[: self.whole] = self.final
        return canvas


def resumed(
    options: Options, resolved: ResolvedOptions, prompt_tokens: int, text: Text, vocabulary: Vocabulary
) -> Resumed:
    """The answer's beginning, checked. Raises `BadRequest`; `RequestFailed` if the tokenizer fails."""
    ids = list(options.resume_token_ids)
    said = AnswerText(text, cutting(options))
    if not ids:
        return Resumed(np.zeros(0, dtype=np.int32), 0, said)
    token_ids(ids, vocabulary.size, NAME)
    if vocabulary.mask_id in ids:
        raise BadRequest(f"{NAME} holds the mask token {vocabulary.mask_id}, which no answer has", param=NAME)
    check_length(options, resolved)
    stop = first_stop(ids, options, vocabulary)
    said.push(ids if stop is None else ids[: stop + said.cut.shown])
    ended: FinishReason | None = None
    if said.stops.found or stop is not None:
        ended = "stop"
    elif len(ids) == resolved.max_tokens:
        ended = "length"
    whole = whole_tokens(resolved, prompt_tokens, len(ids))
    if ended is None and whole < len(ids):
        check_open_block(resolved)
    return Resumed(np.array(ids, dtype=np.int32), whole, said, ended)


def check_length(options: Options, resolved: ResolvedOptions) -> None:
    """Raise `BadRequest` for more tokens than the answer may have."""
    if (count := len(options.resume_token_ids)) > resolved.max_tokens:
        raise BadRequest(
            f"{NAME} holds {count} tokens, and max_tokens, which counts the whole answer, is {resolved.max_tokens}",
            param=NAME,
        )


def first_stop(ids: list[int], options: Options, vocabulary: Vocabulary) -> int | None:
    """The place of the first token that ends the answer."""
    ends: Collection[int] = {*options.stop_token_ids, *(() if options.ignore_eos else vocabulary.stop_ids)}
    return next((place for place, id in enumerate(ids) if place >= options.min_tokens and id in ends), None)


def whole_tokens(resolved: ResolvedOptions, prompt_tokens: int, count: int) -> int:
    """How many of the answer's first `count` tokens lie in blocks that these fill."""
    decoding, end = resolved.decoding, prompt_tokens + count
    length = decoding.block_length
    begin = prompt_tokens if decoding.traits.grid == "prompt" else 0
    if end >= resolved.canvas_tokens:
        return count
    return max(0, (end - begin) // length * length + begin - prompt_tokens)


def check_open_block(resolved: ResolvedOptions) -> None:
    """Raise `BadRequest` where tokens of a block are nothing by themselves, so that it cannot go on from some."""
    decoding = resolved.decoding
    if decoding.traits.noise_steps:
        reason = "this model writes a block at once"
    elif decoding.editing_threshold is not None:
        reason = "with editing_threshold, tokens may be replaced until their block is finished"
    else:
        return
    raise BadRequest(
        f"{NAME} ends within a block of {decoding.block_length} tokens, and {reason}; leave out those of that block",
        param=NAME,
    )
