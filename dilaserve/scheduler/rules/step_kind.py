"""What a step must compute for one row, by cache kind (Fast-dLLM, arXiv 2505.22618, section 3.2)."""

import msgspec

from dilaserve.config import CacheKind
from dilaserve.types import FamilyTraits


class View(msgspec.Struct, frozen=True, gc=False):
    """A row before its next step: its canvas length, its active block, and how many of its first tokens have K/V that
    may be reused. `first`: only the block's first token is unmasked, by the logits of the position before the block.
    `limit`: queries of a step, where what lies before the block may be computed in several.
    """

    canvas: int
    block_start: int
    block_end: int
    cached: int
    first: bool = False
    limit: int = 2**31


class Work(msgspec.Struct, frozen=True, gc=False):
    """Queries of one step, the keys that they see, and whether they rewrite K/V that later steps reuse.

    `cached`: tokens whose K/V may be reused after it. `chunk`: it unmasks nothing, as it is a part of what lies before
    the block. `grain` and `origin`: see `types.Span`.
    """

    start: int
    length: int
    keys: int
    refresh: bool
    cached: int
    grain: int = 0
    origin: int = 0
    chunk: bool = False


def none(view: View, traits: FamilyTraits, block_length: int) -> Work:
    return Work(0, view.canvas, view.canvas, True, view.canvas)


def prefix(view: View, traits: FamilyTraits, block_length: int) -> Work:
    fresh = view.cached >= view.canvas
    start = view.block_start if fresh else 0
    return Work(start, view.canvas - start, view.canvas, not fresh, view.canvas)


def dual(view: View, traits: FamilyTraits, block_length: int) -> Work:
    if view.cached >= view.canvas:
        start, end = view.block_start, view.block_end
        return Work(start, end - start, view.canvas, False, view.canvas)
    return Work(0, view.canvas, view.canvas, True, view.canvas)


def exact(view: View, traits: FamilyTraits, block_length: int) -> Work:
    """What lies before the block and is not cached yet, and the block; the former alone for the block's first token.

    So the prompt's K/V and those of each finished block are written on the way into the next block; in chunks of whole
    runs that see alike if they are too many for a step.
    """
    start, end = view.cached, view.block_start if view.first else view.block_end
    if start == view.block_start:
        return Work(start, end - start, end, False, start)
    grain = 1 if traits.attention == "causal" else block_length
    if end - start > view.limit:
        runs = max(1, view.limit // grain)
        stop = start + runs * grain - (start - view.block_start) % grain
        if stop < end and stop <= view.block_start:
            return Work(start, stop - start, stop, True, stop, grain, view.block_start, chunk=True)
    return Work(start, end - start, end, True, view.block_start, grain, view.block_start)


CACHES = {"none": none, "prefix": prefix, "dual": dual, "exact": exact}


def work(cache: CacheKind, view: View, traits: FamilyTraits, block_length: int) -> Work:
    return CACHES[cache](view, traits, block_length)
