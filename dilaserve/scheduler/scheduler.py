"""The state machine between events and commands. It remembers; it has no clock, no device and never waits."""

from collections.abc import Iterator, Mapping, Sequence

from dilaserve.config import Config
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.step_cost import StepCost
from dilaserve.scheduler import kv_memory
from dilaserve.scheduler.arrival_check import ArrivalCheck
from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.endings import Endings
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.instance_changes import InstanceChanges
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import Placement
from dilaserve.scheduler.plan_change import PlanState, plan_of
from dilaserve.scheduler.planner_questions import PlannerQuestions
from dilaserve.scheduler.quotes import Quotes
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import RequestState, Status, Transition
from dilaserve.scheduler.retry_times import RetryTimes
from dilaserve.scheduler.row_selection import RowSelection
from dilaserve.scheduler.rules.thresholds import crowding
from dilaserve.scheduler.step_reports import denoised, remember
from dilaserve.types import (
    Arrival,
    Cancel,
    Command,
    Emit,
    Event,
    Full,
    InstanceLost,
    InstanceReady,
    Launch,
    Paused,
    Plan,
    PlanReady,
    PrefixGrown,
    Refuse,
    Replan,
    Reshaped,
    RowResult,
    StepDone,
    WorkerLost,
    WorkerUp,
)

TICK = 0.25  # seconds between two passes over all waiting requests
MOST_ENDS = 32  # requests that one decision declines at their deadline, and gives up, at most; about 30 µs each
LATELY = 30.0  # seconds for which a deadline counts as recent, and best-effort work is limited
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
        self.estimates = Estimates(laws, quality, config.device.max_num_batched_tokens)
        self.deadlines = Deadlines(policy, self.estimates)
        self.placement = Placement(config, self.deadlines)
        self.batcher = Batcher(config, self.placement, self.estimates, repeats)
        self.plan_state = PlanState(plan, degrees, policy.step_timeout)
        self.questions = PlannerQuestions(self.placement, self.plan_state, solves)
        self.endings = Endings(self.placement, self.deadlines, self.questions)
        self.requests, self.totals = self.endings.requests, self.endings.totals
        self.instance_changes = InstanceChanges(self.placement, self.plan_state, self.batcher, self.endings)
        self.retry_times = RetryTimes(self.placement, self.estimates)
        self.expiry = Expiry()  # of requests whose client does not want the answer late
        self.tightest = RecentMinimum(LATELY)  # seconds from arrival to deadline
        self.arrival_check = ArrivalCheck(policy, self.placement, self.plan_state, self.tightest)
        self.quotes = Quotes(self.arrival_check, self.endings, self.retry_times)
        self.selection = RowSelection(self.placement, self.deadlines, self.batcher, self.tightest)
        self.ticked_at = self.decided_at = -NEVER
        self.gives_up = False  # more requests have become hopeless than one decision looks at

    def observe(self, event: Event, now: float) -> Iterator[Command]:
        match event:
            case StepDone():
                yield from self.step_done(event, now)
            case Arrival():
                yield from self.arrival(event, now)
            case Cancel(id, reason):
                if known := self.requests.get(id):  # it may have ended while the event was on its way
                    yield from self.endings.end(known, reason, now)
            case PrefixGrown(id, hashes):
                if known := self.requests.get(id):
                    known.prefix_hashes += hashes
            case Full(tenant):
                if loser := self.placement.gives_way(tenant):
                    refuse = Refuse(loser.request, self.retry_times.next(now), loser.usage(now))
                    yield from self.endings.gone(loser, refuse, now, "refused")
            case InstanceReady(instance):
                self.instance_changes.opened(instance)
            case InstanceLost(instance, reason, outside):
                yield from self.instance_changes.lost(instance, reason, outside, now)
            case WorkerUp(rank, kv_tokens):
                reason = f"worker {rank} is up" if self.plan_state.next_id else "the start"
                self.plan_state.asked(now, self.placement.instances(), reason)
                self.plan_state.workers[rank] = kv_tokens
            case WorkerLost(rank, reason):
                self.plan_state.asked(now, self.placement.instances(), f"worker {rank} is gone ({reason})")
                self.plan_state.workers.pop(rank, None)
                self.placement.doom(rank)
            case Paused(seconds):
                self.instance_changes.paused(seconds)
            case Replan(plan, reason):
                self.questions.solves = plan is None
                self.replan(plan or self.plan_state.wanted, reason, now)
            case PlanReady(plan, reason):
                self.questions.solving = False
                if self.questions.solves and plan is not None and plan != self.plan_state.wanted:
                    self.replan(plan, reason, now)

    def decide(self, now: float) -> Iterator[Command]:
        """What is due now, step by step: ends first, then the plan, then placement, then batches for idle instances."""
        self.decided_at = now
        yield from self.decline_expired(now)
        yield from self.instance_changes.change_plan(now)
        self.instance_changes.resume_moved_rows(now)
        yield from self.instance_changes.kill_hung(now)
        yield from self.ask_planner(now)
        ticks = self.ticks(now)
        yield from self.give_up_hopeless(now, ticks)
        if ticks:
            self.tick(now)
        self.placement.place(now, everywhere=ticks)
        yield from self.reject_unplaced(now)
        yield from self.launch_idle(now)
        yield from self.batcher.stop_early()
        yield from self.complete_change(now)

    def ticks(self, now: float) -> bool:
        """Whether all waiting requests are looked at again, every quarter of a second while there is a reason."""
        reason = self.placement.queue or self.deadlines.admits or self.deadlines.floor
        return now >= self.ticked_at + TICK and bool(reason)

    def decline_expired(self, now: float) -> Iterator[Command]:
        """Requests whose client does not want the answer late, at their deadline."""
        for state in self.expiry.passed(now, MOST_ENDS):
            yield from self.endings.decline(state, now)

    def reject_unplaced(self, now: float) -> Iterator[Command]:
        """Requests that came together were compared with the rows that there were; now some of them are rows too."""
        unplaced, self.placement.unplaced = self.placement.unplaced, []
        for state in unplaced:
            rejects = state.request.slo.on_miss == "reject" and not state.steps
            if rejects and not self.arrival_check.admissible(state, now):
                yield from self.endings.decline(state, now)

    def ask_planner(self, now: float) -> Iterator[Command]:
        if now >= self.questions.solve_at and self.questions.asks:
            yield self.questions.solve(now)

    def launch_idle(self, now: float) -> Iterator[Command]:
        """The next batch of each instance that has rows and no step in flight."""
        for replica in self.placement.replicas.values():
            if replica.in_flight is None and replica.residents:
                yield from self.launch(replica, now)

    def complete_change(self, now: float) -> Iterator[Command]:
        """Report a plan once its instances are up."""
        complete = self.plan_state.change and not self.placement.closing
        if complete and (change := self.plan_state.completed(self.placement.instances(), now)):
            self.questions.traffic.changed(now)
            yield Reshaped(change)
            if self.plan_state.whole:
                yield from self.instance_changes.fail_large(now)

    @property
    def plan(self) -> Plan:
        """The instances that there are."""
        return plan_of(self.placement.instances())

    def wake_at(self) -> float:
        """When to decide again even if nothing happens: for requests that wait or reach their deadline, for a step that
        hangs, for the planner.
        """
        tick_at = self.ticked_at + TICK if self.placement.queue or self.deadlines.floor else NEVER
        solve_at = self.questions.solve_at if self.questions.asks else NEVER
        if self.gives_up or self.placement.places_more or (self.deadlines.admits and self.placement.queue.untested):
            return self.decided_at  # a decision looks at only so many
        changes = self.instance_changes
        move_by = changes.move_by if self.placement.moving else NEVER
        return min(tick_at, self.plan_state.form_by, changes.next_overdue(), self.expiry.next_at(), solve_at, move_by)

    # the plan

    def replan(self, plan: Plan | None, reason: str, now: float) -> None:
        self.plan_state.asked(now, self.placement.instances(), reason)
        self.plan_state.wanted = plan

    def arrival(self, event: Arrival, now: float) -> Iterator[Command]:
        request = event.request
        state = self.deadlines.arrived(request)
        slo, check = request.slo, self.arrival_check
        state.deadline = check.deadline(state)
        if state.deadline is not None:
            self.tightest.add(state.deadline - request.arrived_at, now)
        if self.questions.solves:
            self.questions.first_traffic(now)
            self.questions.traffic.arrived(check.seen(state, now))
        self.requests[request.id] = state
        self.totals.received += 1
        state.has_deadline = state.deadline is not None
        rejects = state.has_deadline and slo.on_miss == "reject" and not check.admissible(state, now)
        self.placement.enter(state)
        state.seconds = self.estimates.unloaded(state)
        self.placement.backlog.add(state)
        if request.ended:
            yield from self.endings.end(state, request.ended, now)
        elif rejects:
            yield from self.endings.decline(state, now)
        elif check.is_too_much(state, now):
            refuse = Refuse(request, self.retry_times.next(now), state.usage(now), too_much=True)
            yield from self.endings.gone(state, refuse, now, "refused")
        elif self.deadlines.sheds and state.deadline is not None and slo.on_miss != "best_effort":
            self.expiry.add(state, state.deadline, len(self.requests))

    def step_done(self, event: StepDone, now: float) -> Iterator[Command]:
        replica = self.placement.replicas.get(event.instance) or self.placement.closing.get(event.instance)
        if replica is None or replica.in_flight is None or replica.batch is None or replica.batch.id != event.batch:
            return  # the instance was lost after it had sent this
        in_flight = replica.in_flight
        if replica.multi_step:
            self.batcher.reported(replica, in_flight, event.results)
        self.batcher.done(replica.degree)
        self.totals.stepped(replica.refreshing, event.results)
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
            state.stepping += event.seconds
            remember(state, result, now, event.seconds)
            done = self.row_done(state, result, share * event.seconds, event.last, now)
            yield from self.endings.contained(state, done)

    def row_done(
        self, state: RequestState, result: RowResult, seconds: float, last: bool, now: float
    ) -> Iterator[Command]:
        """The part of one row in a step that is finished; `seconds` are its share of it."""
        leaving = state.status is Status.LEAVING
        state.stepped_at = now
        state.device += seconds
        if last:
            state.did(Transition.RETURNED)
        if leaving:
            self.totals.spent(seconds, state.wasted)
            if last:
                yield self.endings.release(state)
        elif not result.rested:
            yield from self.returned(state, result, now)

    def returned(self, state: RequestState, result: RowResult, now: float) -> Iterator[Command]:
        """A row is back from a step: emit what is final, end it if that is all."""
        request, before = state.request, state.prefix
        kv_memory.publish(state)
        if state.in_chunk:
            state.did_chunk()
            return
        masks, part = state.block_masks, state.part
        if result.masks_left and not result.unmasked and not request.decoding.traits.noise_steps:
            raise RuntimeError("a step has unmasked nothing, so that the request would never end")
        result = state.advance(result)
        end = request.prompt_tokens + request.max_tokens
        stopped = 0 <= result.stop_at < result.prefix
        self.estimates.watched(state, masks, part.block, result.unmasked - result.edited, stopped, part.first)
        if request.shows_canvas:
            yield denoised(state, part, result)
        prefix = state.prefix = max(before, min(result.stop_at if stopped else result.prefix, end))
        if prefix > before:
            yield Emit(request, prefix)
        if stopped and result.stop_at < end:
            yield from self.endings.end(state, "stop", now)
        elif result.prefix >= end:
            yield from self.endings.end(state, "length", now)

    # deadlines

    def tick(self, now: float) -> None:
        """Every quarter of a second: move the floor of the thresholds, by what instances saw at their last step."""
        self.ticked_at = now
        if not self.deadlines.moves_floor:
            return
        waiting = len(self.placement.queue)
        missing, total, crowd = len(self.placement.queue.tested), waiting, float(waiting)  # each is one more somewhere
        for replica in self.placement.replicas.values():
            if replica.with_deadline:
                missing, total = missing + replica.late, total + len(replica.with_deadline)
                crowd += replica.crowding
        self.deadlines.look(missing, total, crowd / max(1, len(self.placement.replicas)))

    def give_up_hopeless(self, now: float, ticks: bool) -> Iterator[Command]:
        """Give up on waiting requests that can no longer end in time: at a tick, or if the last decision left some.

        One request per instance without deadlines is kept and tried there, as estimates may err. A request whose
        deadline has passed is always given up.
        """
        if not (self.deadlines.sheds and (ticks or self.gives_up)):
            return
        spare = sum(not replica.with_deadline for replica in self.placement.replicas.values())
        hopeless = self.placement.hopeless
        for state in hopeless.passed(now, MOST_ENDS):
            if state not in self.placement.queue:
                continue
            past = self.deadlines.is_past(state, now)
            if past or (self.deadlines.shed and self.deadlines.is_hopeless(state, now)):
                spare -= 1
                if spare < 0 or past:
                    yield from self.endings.give_up(state, now)
                    continue
            again = max(now + TICK, self.deadlines.hopeless_at(state))
            hopeless.add(state, again, len(self.requests))
        self.gives_up = hopeless.next_at() <= now

    def refused(self, timed: bool, now: float) -> float:
        """Count a request that found no place; returns the seconds after which a place will probably be free for it.

        Each refused request gets another time, so that not all of them come back at once.
        """
        self.totals.received += 1
        self.totals.ended("refused", False if timed else None)
        return self.retry_times.next(now)

    # steps

    def launch(self, replica: InstanceState, now: float) -> Iterator[Command]:
        """The next step of an idle instance: give up lost deadlines, choose thresholds, select rows, send the batch."""
        if self.deadlines.rank_moves:
            replica.with_deadline.sort(key=self.deadlines.rank)
        self.placement.grow_rows(replica)
        if not replica.residents:
            return
        queries = self.selection.queries(replica, now)
        if lost := self.selection.beyond_hope(replica, queries):
            for state in [replica.with_deadline[place] for place in lost]:
                yield from self.endings.give_up(state, now)
            if not replica.residents:
                return
            queries = [query for place, query in enumerate(queries) if place not in lost]
        choices = self.selection.choices(replica, queries)
        replica.late = sum(choice.late for choice in choices.values())
        replica.crowding = crowding([query.loads[0] for query in queries], self.estimates.pace(replica.degree).fixed)
        candidates = self.selection.selected(replica, choices, now)
        yield from self.selection.adjusted(replica, candidates, choices)
        batch = self.batcher.begin(replica, candidates, now)
        self.instance_changes.launched(replica, now)
        yield Launch(batch)
