"""How requests end: answered, declined, refused, cancelled or failed. Each client gets one answer.

It takes an ended request off its queue or instance, settles its accuracy, counts its fate and frees its row.
"""

import logging
from collections import deque
from collections.abc import Iterator

from dilaserve.errors import OURS
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.planner_questions import PlannerQuestions
from dilaserve.scheduler.request_state import RequestState, Status, Transition
from dilaserve.scheduler.rules.admission import retry_after
from dilaserve.scheduler.totals import Fate, Totals
from dilaserve.types import Command, Decline, Fail, Finish, FinishReason, Release, Request

log = logging.getLogger(__name__)
RECENT = 16  # ended requests that can still be looked at


class Endings:
    """Ends requests; `requests` are those that have not ended, by id."""

    def __init__(self, placement: Placement, deadlines: Deadlines, questions: PlannerQuestions) -> None:
        self.placement, self.deadlines, self.questions = placement, deadlines, questions
        self.requests: dict[str, RequestState] = {}
        self.totals = Totals()
        self.recent: deque[RequestState] = deque(maxlen=RECENT)  # those that took steps and ended last
        self.disturbed = False  # a handler has stopped half-way since the last repair

    def end(self, state: RequestState, reason: FinishReason, now: float) -> Iterator[Command]:
        fate: Fate = "cancelled" if reason == "cancelled" else "answered"
        yield from self.gone(state, Finish(state.request, reason, state.usage(now)), now, fate)

    def decline(self, state: RequestState, now: float) -> Iterator[Command]:
        """The deadline cannot be met, or has passed: tell the client, now."""
        yield from self.gone(state, self.declined(state, now), now, "declined")

    def declined(self, state: RequestState, now: float) -> Decline:
        request, usage = state.request, state.usage(now)
        if state.steps:
            return Decline(request, usage, None)
        wait = retry_after(self.placement.backlog.timed, len(self.placement.replicas))
        return Decline(request, usage, wait, self.deadlines.is_never_feasible(state))

    def give_up(self, state: RequestState, now: float) -> Iterator[Command]:
        """The deadline cannot be met any more: go on as best effort, or end, as `on_miss` says."""
        if state.request.slo.on_miss != "best_effort":
            yield from self.decline(state, now)
            return
        self.placement.demote(state)

    def gone(self, state: RequestState, message: Command, now: float, fate: Fate) -> Iterator[Command]:
        """The only way in which requests end. The client hears now; the row is freed now or after its step."""
        self.placement.leave(state)
        self.placement.backlog.remove(state)
        state.did(Transition.ENDED)
        self.settle_bank(state, fate)
        commands = [message, self.release(state)] if state.status is Status.GONE else [message]
        self.account(state, now, fate)
        if state.timeline:
            self.recent.append(state)
        del self.requests[state.request.id]  # last: while it is known, an error here still ends it as failed
        yield from commands

    def settle_bank(self, state: RequestState, fate: Fate) -> None:
        """The tenant's accuracy bank pays for an answer, and for a part of one that its client keeps."""
        self.deadlines.ledger.reserve(state, 0.0)
        if fate == "answered":
            self.deadlines.ledger.charge(state)
        elif fate in ("cancelled", "failed") and (delivered := state.prefix - state.request.begin) > 0:
            self.deadlines.ledger.charge(state, min(1.0, delivered / state.request.max_tokens))

    def account(self, state: RequestState, now: float, fate: Fate) -> None:
        """Count the request's fate, once, and the device seconds spent on it."""
        met = None if state.deadline is None else fate == "answered" and now <= state.deadline
        state.wasted = met is False and fate != "cancelled"
        if self.questions.solves and met is not None and fate != "cancelled":
            self.questions.traffic.ended(state.request.received_at, met, now)
        self.totals.ended(fate, met)
        self.totals.spent(state.device, state.wasted)
        self.totals.prompt(state.request.prompt_tokens, state.cached_prompt_tokens)

    def release(self, state: RequestState) -> Release:
        """Take the row off its instance, if it is on one, and free it."""
        if state.replica:
            self.placement.unassign(state, state.replica)
        return Release(state.request.row)

    def contained(self, state: RequestState, commands: Iterator[Command]) -> Iterator[Command]:
        """The commands of one row among several; if they raise, its request ends and the others go on."""
        try:
            yield from commands
        except Exception as error:
            yield from self.expel(state, error)

    def expel(self, state: RequestState, error: Exception) -> Iterator[Command]:
        """Handling the request has raised: it ends, whatever state that left it in. `repair` cleans up behind it."""
        request = state.request
        known = self.requests.pop(request.id, None)  # None: its client has its answer
        replicas = self.placement.all_replicas()
        in_flight = any(row is state for replica in replicas for row in replica.in_flight or ())
        state.status = Status.LEAVING if in_flight else Status.GONE
        self.disturbed = True
        if known:
            state.wasted = state.deadline is not None
            self.totals.ended("failed", False if state.wasted else None)
            self.totals.spent(state.device, state.wasted)
            yield failed(request, error)
        else:
            log.error("request %s had ended, and an error came behind it", request.id, exc_info=error)
        if not in_flight:
            yield Release(request.row)

    def turn_away(self, request: Request, error: Exception) -> Iterator[Command]:
        """Taking in a request has raised: it ends."""
        timed = request.slo.seconds is not None or request.slo.multiple is not None
        self.totals.received += 1
        self.totals.ended("failed", False if timed else None)
        yield failed(request, error)
        yield Release(request.row)


def failed(request: Request, error: Exception) -> Fail:
    """The command that reports to the client and to the log that handling the request raised an error."""
    return Fail(request, f"its handling raised {type(error).__name__}: {error}", OURS, error)
