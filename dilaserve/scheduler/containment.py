"""Runs the scheduler so that an error in the handling of one request ends that request, and not the engine.

An exception out of `observe` or `decide` names its request by its traceback: the innermost frame that works on one
request is to blame. That request is removed, what the handler left half done is repaired, and the invariants are
checked. The engine ends if no request is to blame, or if the state is inconsistent all the same.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping

from dilaserve.errors import OURS, DilaserveError, RequestFailed
from dilaserve.scheduler.invariants import violations
from dilaserve.scheduler.repair import repair
from dilaserve.scheduler.request_state import RequestState
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.types import Arrival, Cancel, Command, Event, Full, Release, Request

log = logging.getLogger(__name__)


class StateBroken(DilaserveError):
    """The scheduler's state is inconsistent; the engine cannot go on."""

    code = "state_broken"


class Guard:
    """The scheduler's `observe` and `decide`, with errors contained.

    `Fail` with its `error` reports each. Raises errors for which no request is to blame, `StateBroken`, and
    `RequestFailed` on behalf of a request that has no row yet.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def observe(self, event: Event, now: float) -> Iterator[Command]:
        """An event whose handling raised is handled again, without the request that was to blame."""
        yield from self.contained(lambda: self.scheduler.observe(event, now), event)

    def decide(self, now: float) -> Iterator[Command]:
        yield from self.contained(lambda: self.scheduler.decide(now))

    def contained(self, handle: Callable[[], Iterator[Command]], event: Event | None = None) -> Iterator[Command]:
        """Each round but the last removes a request, so that there is an end."""
        again = True
        while again:
            again = False
            try:
                yield from handle()
            except Exception as error:
                ended = yield from self.removed(error, event)
                yield from self.repaired()
                again = is_open(event, ended, self.scheduler.requests)
        if self.scheduler.endings.disturbed:
            yield from self.repaired()

    def removed(self, error: Exception, event: Event | None) -> Generator[Command, None, str]:
        """The request to blame ends; returns its id. Raises the error where there is none."""
        requests = self.scheduler.requests
        if state := blamed(error, requests) or subject(event, requests):
            yield from self.scheduler.endings.expel(state, error)
            return state.request.id
        if isinstance(event, Arrival) and event.request.id not in requests:
            yield from self.scheduler.endings.turn_away(event.request, error)
            return event.request.id
        if isinstance(event, Full):
            log.error("looking for a place for a request failed", exc_info=error)
            raise RequestFailed(OURS) from error
        raise error

    def repaired(self) -> Iterator[Command]:
        """Raises `StateBroken` where that cannot be done."""
        scheduler = self.scheduler
        free: list[int] | None = None
        while free is None:
            try:
                free = repair(scheduler.placement, scheduler.requests)
            except Exception as error:
                yield from self.removed(error, None)
        scheduler.endings.disturbed, scheduler.plan_state.needs_reshape = False, True
        for row in free:
            yield Release(row)
        if broken := violations(scheduler):
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise StateBroken(f"the engine's state is inconsistent after an error: {broken[0]}{more}; start it again")


def is_open(event: Event | None, ended: str, requests: Mapping[str, RequestState]) -> bool:
    """Whether an event that raised is to be handled again, after the request `ended` has been removed."""
    match event:
        case Arrival(request):
            return request.id != ended and request.id not in requests  # one that is known waits in its line
        case Cancel(id):
            return id in requests
    return True


def subject(event: Event | None, requests: Mapping[str, RequestState]) -> RequestState | None:
    """The request that an event is about."""
    match event:
        case Arrival(request):
            return requests.get(request.id)
        case Cancel(id):
            return requests.get(id)
    return None


def blamed(error: BaseException, requests: Mapping[str, RequestState]) -> RequestState | None:
    """The request that the innermost frame of the error's traceback works on, if any frame works on one."""
    frames, step = [], error.__traceback__
    while step:
        frames.append(step.tb_frame)
        step = step.tb_next
    for frame in reversed(frames):
        for value in list(frame.f_locals.values()):
            if isinstance(value, RequestState | Request) and (found := known(value, requests)):
                return found
    return None


def known(value: RequestState | Request, requests: Mapping[str, RequestState]) -> RequestState | None:
    request = value.request if isinstance(value, RequestState) else value
    found = requests.get(request.id)
    return found if found and found.request is request else None
