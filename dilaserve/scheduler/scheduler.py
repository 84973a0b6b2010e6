"""The state machine between events and commands. It remembers; it has no clock, no device and never waits."""

import logging
from collections.abc import Iterator, Mapping, Sequence

from dilaserve.config import Config
from dilaserve.errors import OURS
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.step_cost import StepCost
from dilaserve.scheduler.accounting import Accounting
from dilaserve.scheduler.admission_control import AdmissionControl
from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.deadline_ticks import DeadlineTicks
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.placer import Placer
from dilaserve.scheduler.plan_change import PlanState, plan_of
from dilaserve.scheduler.plan_execution import PlanExecution
from dilaserve.scheduler.planner_requests import PlannerRequests
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import Phase, RequestState, Transition
from dilaserve.scheduler.retry_times import RetryTimes
from dilaserve.scheduler.step_selection import StepSelection
from dilaserve.scheduler.totals import Fate, Totals
from dilaserve.types import (
    Adjust,
    Arrival,
    Cancel,
    Command,
    Emit,
    Event,
    Fail,
    Finish,
    FinishReason,
    Full,
    InstanceLost,
    InstanceReady,
    Launch,
    Paused,
    Plan,
    PlanReady,
    Refuse,
    Release,
    Replan,
    Request,
    Reshaped,
    RowResult,
    StepDone,
    WorkerLost,
    WorkerUp,
)

log = logging.getLogger(__name__)
MOST_DECLINES = 32  # requests that one decision declines at their deadline; about 30 µs each
LATELY = 30.0  # seconds for which a deadline counts as one of those that come
NEVER = float("inf")


class Scheduler:
    """Turns events into commands: `observe` takes one event, `decide` fills idle instances.

    The same events at the same times give the same commands. `laws` are step costs by tensor-parallel degree. `plan` is
    the wanted one; None takes instances as they come. `solves`: ask the planner now and then.
    """

    def __init__(
        self,
        config: Config,
        laws: Mapping[int, StepCost],
        quality: QualityProfile,
        plan: Plan | None = None,
        degrees: Sequence[int] = (1,),
        solves: bool = False,
        repeats: int = 1,
    ) -> None:
        policy = config.scheduler
        self.estimates = Estimates(laws, quality)
        self.deadlines = Deadlines(policy, self.estimates)
        self.placement = Placement(config, self.deadlines)
        self.placer = Placer(self.placement, policy.guaranteed_rows)
        self.batcher = Batcher(config, self.placement, self.estimates, repeats)
        self.requests: dict[str, RequestState] = {}
        self.expiry = Expiry()  # of requests whose client does not want the answer late
        self.tightest = RecentMinimum(LATELY)  # seconds from arrival to deadline
        self.plan_state = PlanState(plan, degrees, policy.step_timeout)
        self.admission = AdmissionControl(policy, self.placer, self.plan_state, self.tightest)
        self.selection = StepSelection(self.deadlines, self.placement, self.batcher, self.tightest)
        self.execution = PlanExecution(self.plan_state, self.placement, self.batcher, self.contained)
        self.retry_times = RetryTimes(self.placement, self.estimates)
        self.planning = PlannerRequests(solves, self.plan_state, self.placement, self.estimates)
        self.ticks = DeadlineTicks(self.deadlines, self.placement)
        self.decided_at = -NEVER
        self.totals = Totals()
        self.accounting = Accounting(self.deadlines.ledger, self.planning, self.totals)
        self.disturbed = False  # a handler has stopped half-way since the last repair

    def observe(self, event: Event, now: float) -> Iterator[Command]:
        match event:
            case StepDone():
                yield from self.step_done(event, now)
            case Arrival():
                yield from self.arrival(event, now)
            case Cancel(id, reason):
                if known := self.requests.get(id):  # it may have ended while the event was on its way
                    yield from self.end(known, reason, now)
            case Full(tenant):
                if loser := self.placement.gives_way(tenant):
                    yield from self.gone(loser, Refuse(loser.request, self.retry_times.place_in(now)), now, "refused")
            case InstanceReady(instance):
                self.plan_state.formed(instance)
                self.placement.replicas[instance.id] = InstanceState(instance)
                self.placement.instances_changed()
                self.placement.move_to(instance, self.plan_state.forming.values())
            case InstanceLost(instance, reason, outside):
                self.plan_state.over(instance)
                self.plan_state.needs_reshape = True
                if replica := self.placement.replicas.pop(instance, None) or self.placement.closing.pop(instance, None):
                    self.placement.instances_changed()
                    yield from self.evict(replica, reason, outside, now)
            case WorkerUp(rank, kv_tokens):
                reason = f"worker {rank} is up" if self.plan_state.next_id else "the start"
                self.plan_state.asked(now, self.placement.instances(), reason)
                self.plan_state.workers[rank] = kv_tokens
            case WorkerLost(rank, reason):
                self.plan_state.asked(now, self.placement.instances(), f"worker {rank} is gone ({reason})")
                self.plan_state.workers.pop(rank, None)
                self.placement.doom(rank)
            case Paused(seconds):
                self.execution.paused(seconds)
            case Replan(plan, reason):
                self.planning.active = plan is None
                self.replan(plan or self.plan_state.wanted, reason, now)
            case PlanReady(plan, reason):
                self.planning.waiting = False
                if self.planning.active and plan is not None and plan != self.plan_state.wanted:
                    self.replan(plan, reason, now)

    def decide(self, now: float) -> Iterator[Command]:
        """What is due now, step by step: ends first, then the plan, then placement, then batches for idle instances."""
        self.decided_at = now
        yield from self.decline_expired(now)
        yield from self.execution.change(now)
        self.execution.resume_moved_rows(now)
        yield from self.execution.kill_hung(now)
        yield from self.planning.due(now)
        ticks = self.ticks.due(now)
        for state in self.ticks.hopeless(now, ticks, len(self.requests)):
            yield from self.give_up(state, now)
        if ticks:
            self.ticks.move_floor(now)
        self.placer.place(now, everywhere=ticks)
        yield from self.launch_idle(now)
        yield from self.batcher.stop_early()
        yield from self.complete_change(now)

    def decline_expired(self, now: float) -> Iterator[Command]:
        """Requests whose client does not want the answer late, at their deadline."""
        for state in self.expiry.passed(now, MOST_DECLINES):
            yield from self.decline(state, now)

    def launch_idle(self, now: float) -> Iterator[Command]:
        """The next batch of each instance that has rows and no step in flight."""
        for replica in self.placement.replicas.values():
            if replica.in_flight is None and replica.residents:
                yield from self.launch(replica, now)

    def launch(self, replica: InstanceState, now: float) -> Iterator[Command]:
        """Give up on rows that cannot be in time, choose thresholds, then the rows of the step."""
        queries = self.selection.queries(replica, now)
        if hopeless := self.selection.hopeless(replica, queries):
            for state in [replica.with_deadline[place] for place in hopeless]:
                yield from self.give_up(state, now)
            if not replica.residents:
                return
            queries = [query for place, query in enumerate(queries) if place not in hopeless]
        choices = self.selection.choices(replica, queries)
        candidates = self.selection.rows(replica, choices, now)
        for candidate in candidates:
            state = replica.residents[candidate.key]
            if self.selection.apply(state, choices.get(candidate.key)):
                yield Adjust(candidate.key, state.threshold)
        batch = self.batcher.begin(replica, candidates, now)
        self.execution.launched(replica, now)
        yield Launch(batch)

    def complete_change(self, now: float) -> Iterator[Command]:
        """Report a plan once its instances stand."""
        if change := self.execution.completed(now):
            self.planning.traffic.changed(now)
            yield Reshaped(change)
            if self.plan_state.whole:
                yield from self.fail_large(now)

    @property
    def plan(self) -> Plan:
        """The instances that there are."""
        return plan_of(self.placement.instances())

    def wake_at(self) -> float:
        """When to decide again even if nothing happens: for requests that wait or reach their deadline, for a step that
        hangs, for the planner.
        """
        untested = self.deadlines.admits and self.placement.queue.untested
        if self.ticks.unfinished or self.placer.places_more or untested:
            return self.decided_at  # a decision looks at only so many
        return min(self.ticks.wake_at(), self.execution.wake_at(), self.expiry.next_at(), self.planning.wake_at())

    # the plan

    def replan(self, plan: Plan | None, reason: str, now: float) -> None:
        self.plan_state.asked(now, self.placement.instances(), reason)
        self.plan_state.wanted = plan

    # events

    def arrival(self, event: Arrival, now: float) -> Iterator[Command]:
        request = event.request
        state = self.deadlines.arrived(request)
        slo = request.slo
        if slo.seconds is not None:
            state.deadline = request.arrived_at + slo.seconds
        elif slo.multiple is not None:
            state.deadline = request.arrived_at + slo.multiple * self.estimates.unloaded(state)
        if state.deadline is not None:
            self.tightest.add(state.deadline - request.arrived_at, now)
        self.planning.arrived(state, now)
        self.requests[request.id] = state
        self.totals.received += 1
        state.has_deadline = state.deadline is not None
        rejects = state.has_deadline and slo.on_miss == "reject" and not self.admission.admissible(state, now)
        self.placement.enter(state)
        state.seconds = self.estimates.unloaded(state)
        self.placement.backlog.add(state)
        if rejects:
            yield from self.decline(state, now)
        elif self.admission.is_too_much(state, now):
            yield from self.gone(state, Refuse(request, self.retry_times.place_in(now)), now, "refused")
        elif self.deadlines.sheds and state.deadline is not None and slo.on_miss != "best_effort":
            self.expiry.add(state, state.deadline, len(self.requests))

    def decline(self, state: RequestState, now: float) -> Iterator[Command]:
        """The deadline cannot be met, or has passed: tell the client, now."""
        yield from self.gone(state, self.admission.declined(state, now), now, "declined")

    def step_done(self, event: StepDone, now: float) -> Iterator[Command]:
        replica = self.placement.replicas.get(event.instance) or self.placement.closing.get(event.instance)
        if replica is None or replica.in_flight is None or replica.batch is None or replica.batch.id != event.batch:
            return  # the instance was lost after it had sent this
        in_flight = replica.in_flight
        if replica.multi_step:
            self.batcher.reported(replica, in_flight, event.results)
        self.batcher.done(replica.degree)
        if not replica.disturbed:
            self.estimates.stepped(
                replica.features, replica.refreshing, event.seconds, now - replica.launched_at, replica.degree
            )
        replica.launched_at, replica.multi_step, replica.disturbed = now, True, False
        if event.last:
            replica.in_flight, replica.overdue_at, replica.ends_at = None, NEVER, -NEVER
            self.plan_state.needs_reshape |= event.instance in self.placement.closing
        else:
            replica.ends_at = now + self.estimates.pace(replica.degree).fixed + sum(replica.added.values())
        for state, result, share in zip(in_flight, event.results, replica.shares, strict=True):
            done = self.row_done(state, result, share * event.seconds, event.last, now)
            yield from self.contained(state, done)

    def row_done(
        self, state: RequestState, result: RowResult, seconds: float, last: bool, now: float
    ) -> Iterator[Command]:
        """The part of one row in a step that is finished; `seconds` are its share of it."""
        leaving = state.phase is Phase.LEAVING
        state.stepped_at = now
        state.device += seconds
        if last:
            state.did(Transition.RETURNED)
        if leaving:
            self.totals.spent(seconds, state.wasted)
            if last:
                yield self.release(state)
        elif not result.rested:
            yield from self.returned(state, result, now)

    def returned(self, state: RequestState, result: RowResult, now: float) -> Iterator[Command]:
        """A row is back from a step: emit what is final, end it if that is all."""
        request, before = state.request, state.prefix
        masks, block = state.masks, state.block
        if result.masks_left and not result.unmasked:
            raise RuntimeError("a step has unmasked nothing, so that the request would never end")
        state.advance(result)
        end = request.prompt_tokens + request.max_tokens
        stopped = 0 <= result.stop_at < result.prefix
        self.estimates.watched(state, masks, block, result.unmasked, stopped)
        prefix = min(result.stop_at if stopped else result.prefix, end)
        if prefix > before:
            yield Emit(request, prefix)
        if stopped and result.stop_at < end:
            yield from self.end(state, "stop", now)
        elif result.prefix >= end:
            yield from self.end(state, "length", now)

    def end(self, state: RequestState, reason: FinishReason, now: float) -> Iterator[Command]:
        fate: Fate = "cancelled" if reason == "cancelled" else "answered"
        yield from self.gone(state, Finish(state.request, reason, state.usage(now)), now, fate)

    def gone(self, state: RequestState, last_word: Command, now: float, fate: Fate) -> Iterator[Command]:
        """The one way in which requests end: the client hears now; the row is free now, or after its step in flight."""
        self.placement.leave(state)
        self.placement.backlog.remove(state)
        state.did(Transition.ENDED)
        self.accounting.charge(state, fate)
        commands = [last_word, self.release(state)] if state.phase is Phase.GONE else [last_word]
        self.accounting.ended(state, now, fate)
        del self.requests[state.request.id]  # last: while it is known, an error here still ends it as failed
        yield from commands

    # errors

    def contained(self, state: RequestState, commands: Iterator[Command]) -> Iterator[Command]:
        """The commands of one row among several; if they raise, its request ends and the others go on."""
        try:
            yield from commands
        except Exception as error:
            yield from self.expel(state, error)

    def expel(self, state: RequestState, error: Exception) -> Iterator[Command]:
        """Handling the request has raised: it ends, whatever state that left it in. `repair` cleans up behind it."""
        request = state.request
        known = self.requests.pop(request.id, None)  # else its client has heard already
        replicas = self.placement.all_replicas()
        in_flight = any(row is state for replica in replicas for row in replica.in_flight or ())
        state.phase = Phase.LEAVING if in_flight else Phase.GONE
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

    def release(self, state: RequestState) -> Release:
        """Take the row off its instance, if it is on one, and free it."""
        if state.replica:
            self.placement.unassign(state, state.replica)
        return Release(state.request.row)

    def evict(self, replica: InstanceState, reason: str, outside: bool, now: float) -> Iterator[Command]:
        """The instance is lost: its rows wait again, where they were in the order; they keep all committed tokens.

        Those in flight are suspected of it, unless it was killed from outside: the next step of each is taken alone,
        and if that is lost too, so are they.
        """
        rows = list(replica.residents.values())
        for state in rows:
            yield from self.contained(state, self.lost(state, replica, reason, outside, now))
        self.placement.wait_again([state for state in rows if state.phase is Phase.WAITING])

    def lost(
        self, state: RequestState, replica: InstanceState, reason: str, outside: bool, now: float
    ) -> Iterator[Command]:
        """One row of an instance that is lost."""
        stepping = state.phase is Phase.STEPPING and not outside
        if stepping and state.suspect:
            message = "the request failed twice on our side; it was given up"
            why = f"in flight at two lost workers in a row, the last: {reason}"
            yield from self.gone(state, Fail(state.request, why, message), now, "failed")
        leaving = state.phase is Phase.LEAVING
        state.suspect |= stepping
        self.placement.unassign(state, replica)
        state.did(Transition.EVICTED)
        if leaving:
            yield Release(state.request.row)

    def fail_large(self, now: float) -> Iterator[Command]:
        """All workers are back, some with less memory than before: rows that fit on no instance end."""
        for state in list(self.requests.values()):
            if state.replica is None and not self.placement.ever_fits(state):
                tokens = state.request.canvas_tokens
                why = f"a canvas of {tokens} tokens has no place any more: a worker came back with less memory"
                yield from self.gone(state, Fail(state.request, why, f"{why}; lower max_tokens"), now, "failed")

    # deadlines

    def give_up(self, state: RequestState, now: float) -> Iterator[Command]:
        """The deadline cannot be met any more: go on as best effort, or end, as `on_miss` says."""
        if state.request.slo.on_miss != "best_effort":
            yield from self.decline(state, now)
            return
        self.placement.demote(state)

    def refused(self, timed: bool, now: float) -> float:
        """Count a request that found no place; returns the seconds after which a place will probably be free for it.

        Each refused request gets another time, so that not all of them come back at once.
        """
        self.totals.received += 1
        self.totals.ended("refused", False if timed else None)
        return self.retry_times.place_in(now)


def failed(request: Request, error: Exception) -> Fail:
    """The last word on a request whose handling has raised."""
    return Fail(request, f"its handling raised {type(error).__name__}: {error}", OURS, error)
