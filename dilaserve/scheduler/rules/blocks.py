"""The blocks of a request's canvas, and the parts in which their tokens are unmasked."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from dilaserve.types import Request


class Part(NamedTuple):
    """Positions `[start, end)`, unmasked together, of the block `[block_start, block_end)`; `block` numbers it.

    None of them is of the prompt, as a mask token there is the client's own; the block may begin in it. `first`: the
    first token of the block alone, which comes from the logits of the position before the block.
    """

    start: int
    end: int
    block_start: int
    block_end: int
    block: int
    first: bool = False

    @property
    def masks(self) -> int:
        """Masks of the part before its first step."""
        return self.end - self.start


def parts(request: Request) -> list[Part]:
    """The parts of the canvas that hold masks, from left to right."""
    traits, length, prompt = request.decoding.traits, request.decoding.block_length, request.prompt_tokens
    begin = prompt if traits.grid == "prompt" else prompt // length * length
    found: list[Part] = []
    for block, start in enumerate(range(begin, request.canvas_tokens, length)):
        end = min(start + length, request.canvas_tokens)
        cuts = [start, *inner_cuts(request, start, end), end]
        for first, last in pairwise(cuts):
            if last > prompt:
                alone = takes_first(request, start) and first == start
                found.append(Part(max(first, prompt), last, start, end, block, alone))
    return found


def first_open(parts: Sequence[Part], begin: int) -> int:
    """The place of the first part of the block in which position `begin` lies; the last block's if it lies behind."""
    block = next((part.block for part in parts if part.block_end > begin), parts[-1].block)
    return next(place for place, part in enumerate(parts) if part.block == block)


def inner_cuts(request: Request, start: int, end: int) -> list[int]:
    """Where the parts of a block part."""
    every = request.decoding.traits.part_length
    cuts = set(range(start + every, end, every)) if every else set()
    if takes_first(request, start) and start + 1 < end:
        cuts.add(start + 1)
    return sorted(cuts)


def takes_first(request: Request, start: int) -> bool:
    """Whether the first token of the block comes from the position before: if that is not of the same block's prompt,
    and K/V are kept.
    """
    decoding = request.decoding
    return decoding.traits.first_token and decoding.cache != "none" and start >= request.prompt_tokens
