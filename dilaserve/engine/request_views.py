"""Requests as those who look at the server see them: how far each is, and the steps that it took. Nothing changes."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

import msgspec

from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.scheduler.step_reports import KEPT_STEPS
from dilaserve.types import TimedStep


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """A request that runs or has just ended. Instants are by the engine's clock.

    `tokens` of at most `max_tokens` are final. `threshold`: the one in force, None under decode rules without one.
    `ranks` are the devices of its instance, none once it has ended. `timeline`: its last steps, `KEPT_STEPS` at most.
    """

    id: str
    ended: bool
    arrived_at: float
    started_at: float | None
    deadline: float | None
    prompt_tokens: int
    tokens: int
    max_tokens: int
    steps: int
    refreshes: int
    threshold: float | None
    ranks: tuple[int, ...]
    timeline: tuple[TimedStep, ...]


class UnderWay(NamedTuple):
    """Requests that have not ended: `running` ones have a row on an instance, `waiting` ones have none."""

    running: int
    waiting: int


def under_way(scheduler: Scheduler) -> UnderWay:
    running = scheduler.placement.running
    return UnderWay(running, len(scheduler.requests) - running)


def thresholds_in_force(scheduler: Scheduler) -> list[float]:
    """Of the running requests that go by a threshold; other decode rules leave the table's value unread."""
    return [state.table_threshold for state in residents(scheduler) if state.by_threshold]


def residents(scheduler: Scheduler) -> Iterator[RequestState]:
    """The running requests."""
    rows = chain.from_iterable(replica.residents.values() for replica in scheduler.placement.all_replicas())
    return (state for state in rows if state.request.id in scheduler.requests)


def views(scheduler: Scheduler, most: int) -> list[RequestView]:
    """The requests on instances, `most` at most, and a few that have just ended, the newest first."""
    return [*(view(state, False) for state in islice(residents(scheduler), most)), *ended(scheduler)]


def ended(scheduler: Scheduler) -> list[RequestView]:
    return [view(state, True) for state in reversed(scheduler.endings.recent)]


def view(state: RequestState, has_ended: bool) -> RequestView:
    request = state.request
    return RequestView(
        id=request.id,
        ended=has_ended,
        arrived_at=request.arrived_at,
        started_at=state.started_at,
        deadline=state.deadline,
        prompt_tokens=request.prompt_tokens,
        tokens=min(state.prefix - request.prompt_tokens, request.max_tokens),
        max_tokens=request.max_tokens,
        steps=state.steps,
        refreshes=state.refreshes,
        threshold=state.table_threshold if state.by_threshold else None,
        ranks=state.replica.instance.ranks if state.replica and not has_ended else (),
        timeline=tuple(state.timeline[-KEPT_STEPS:]),
    )
