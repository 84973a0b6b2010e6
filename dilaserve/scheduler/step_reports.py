"""Reports of single steps, for clients that see the canvas and for those who look at requests. No decisions."""

from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.blocks import Part
from dilaserve.types import Denoised, RowResult, TimedStep

KEPT_STEPS = 64  # of a request's timeline; up to twice as many until the older half is dropped


def denoised(state: RequestState, part: Part, result: RowResult) -> Denoised:
    """What a step did to the row, which has taken it in; `part` is what it unmasked. The canvas ends before a stop
    token that has no mask before it: what follows is no part of the answer.
    """
    request = state.request
    stopped = 0 <= result.stop_at < result.prefix
    done = stopped or result.prefix >= part.block_end
    end = min(part.block_end, request.prompt_tokens + request.max_tokens)
    return Denoised(
        request=request,
        step=state.steps,
        kind="commit" if done else "refresh" if state.refreshed else "reuse",
        refresh=state.refreshed,
        block=part.block,
        start=max(part.block_start, request.prompt_tokens),
        end=min(end, result.stop_at) if stopped else end,
        threshold=state.table_threshold if state.by_threshold else None,
    )


def remember(state: RequestState, result: RowResult, now: float, seconds: float) -> None:
    """Note in the row's timeline a step that has just ended, unless the row rested in it."""
    if result.rested:
        return
    state.timeline.append(TimedStep("refresh" if state.refreshed else "reuse", now - seconds, seconds))
    if len(state.timeline) > 2 * KEPT_STEPS:
        del state.timeline[:KEPT_STEPS]
