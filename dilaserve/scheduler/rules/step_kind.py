"""What a step must compute for one row, by cache kind (Fast-dLLM, arXiv 2505.22618, section 3.2)."""

import msgspec

from dilaserve.config import CacheKind


class View(msgspec.Struct, frozen=True, gc=False):
    """A row before its next step: its canvas length, its active block, and whether its K/V is fresh enough to reuse."""

    canvas: int
    block_start: int
    block_end: int
    fresh: bool


class Work(msgspec.Struct, frozen=True, gc=False):
    """Queries of one step and whether they rewrite the row's K/V; keys are always the whole canvas."""

    start: int
    length: int
    refresh: bool


def none(view: View) -> Work:
    return Work(0, view.canvas, True)


def prefix(view: View) -> Work:
    start = view.block_start if view.fresh else 0
    return Work(start, view.canvas - start, not view.fresh)


def dual(view: View) -> Work:
    if view.fresh:
        return Work(view.block_start, view.block_end - view.block_start, False)
    return Work(0, view.canvas, True)


CACHES = {"none": none, "prefix": prefix, "dual": dual}


def work(cache: CacheKind, view: View) -> Work:
    return CACHES[cache](view)
