"""What a node would say of a request that is not there: its deadline, and whether the arrival test would pass.

It reads the scheduler and changes nothing, so that a run goes on as if nobody had asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from dilaserve.engine.engine import Engine
from dilaserve.engine.slo_classes import wanted
from dilaserve.engine.submit import MAX_DEADLINE, Options, resolve, validated
from dilaserve.profile.forecast import Forecast
from dilaserve.scheduler.deadline_check import RowsByInstance, deadline_row
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.rules.admission import fits
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.types import Request

SOONEST = 1e-3  # milliseconds that a deadline has left at least when it reaches a node; the engine takes none below 0


class Quote(NamedTuple):
    """Whether the deadline would be met, the highest confidence threshold at which it would, and the slack.

    `slack`: the share of its time left that the tightest deadline on the instance would keep, from 0 to 1.
    """

    met: bool
    threshold: float = 0.0
    slack: float = 0.0


def quote(engine: Engine, prompt_tokens: int, options: Options, spent: float = 0.0) -> Quote | None:
    """The arrival test for a request whose deadline has been running for `spent` seconds.

    None where there is nothing to test: it has no deadline, or the node admits all, or has no instance yet. Raises
    `BadRequest`.
    """
    scheduler, now = engine.scheduler, engine.loop.time()
    with untouched(scheduler.estimates.forecast):
        state = newcomer(engine, prompt_tokens, options)
        if state.deadline is None or not scheduler.deadlines.admits or not scheduler.placement.replicas:
            return None
        state.deadline -= spent
        return tested(scheduler, state, now)


def hurried(engine: Engine, prompt_tokens: int, options: Options, spent: float) -> Options:
    """The options with what is left of their deadline after `spent` seconds on the way. Raises `BadRequest`."""
    with untouched(engine.scheduler.estimates.forecast):
        state = newcomer(engine, prompt_tokens, options)
    if state.deadline is None:
        return options
    left = 1000 * (state.deadline - state.request.arrived_at - spent)
    return msgspec.structs.replace(options, slo_class=None, deadline_ms=min(MAX_DEADLINE, max(SOONEST, left)))


def alone(engine: Engine, prompt_tokens: int, options: Options) -> float:
    """Seconds that the request would take with nothing else on the node. Raises `BadRequest`."""
    with untouched(engine.scheduler.estimates.forecast):
        return engine.scheduler.estimates.unloaded(newcomer(engine, prompt_tokens, options))


def newcomer(engine: Engine, prompt_tokens: int, options: Options) -> RequestState:
    """The request as the scheduler would see it if it arrived now."""
    checked, limit = validated(options), engine.model.max_model_len
    resolved = resolve(checked, prompt_tokens, limit, 0, engine.config.decode, engine.model.traits)
    request = Request(
        id="",
        row=-1,
        generation=0,
        prompt_tokens=prompt_tokens,
        canvas_tokens=resolved.canvas_tokens,
        max_tokens=resolved.max_tokens,
        arrived_at=engine.loop.time(),
        decoding=resolved.decoding,
        slo=wanted(checked, engine.classes),
    )
    state = engine.scheduler.deadlines.arrived(request)
    seconds = request.slo.seconds
    if request.slo.multiple is not None:
        seconds = request.slo.multiple * engine.scheduler.estimates.unloaded(state)
    if seconds is not None:
        state.deadline, state.has_deadline = request.arrived_at + seconds, True
    return state


def tested(scheduler: Scheduler, state: RequestState, now: float) -> Quote:
    """The best instance that the arrival test finds, at the level at which it passes there."""
    placement, estimates, deadlines = scheduler.placement, scheduler.estimates, scheduler.deadlines
    rows_of: RowsByInstance = {}
    replica = next(placement.check.passed_by(state, placement.open, rows_of, now), None)
    if replica is None:
        return Quote(met=False)
    loads, fixed = estimates.loads(state, replica.degree), estimates.pace(replica.degree).fixed
    deepest = deadlines.ledger.deepest(state)
    for level in range(min(deadlines.floor, deepest), deepest + 1):
        row = deadline_row(state, loads[level], max(now, replica.ends_at))
        slack = fits(row, rows_of[replica.instance.id], fixed)
        if slack is not None:
            return Quote(True, state.thresholds[level], slack)
    raise AssertionError("an instance that has passed the arrival test passes it at one of its levels")


@contextmanager
def untouched(forecast: Forecast) -> Iterator[None]:
    """Forget what the forecast has worked out meanwhile: it learns more slowly, the more it keeps.

    What rows keep is worked out before their step is launched, so a quote finds it there.
    """
    chains, tracks, ladders = len(forecast.chains), len(forecast.known_tracks), len(forecast.ladders)
    yield
    drop_newest(forecast.chains, chains)
    drop_newest(forecast.known_tracks, tracks)
    drop_newest(forecast.ladders, ladders)


def drop_newest(kept: dict[Any, Any], size: int) -> None:
    while len(kept) > size:
        kept.popitem()
