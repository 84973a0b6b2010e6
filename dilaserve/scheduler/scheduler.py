"""The state machine between events and commands. It remembers; it has no clock, no device and never waits."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush

from dilaserve.config import Config
from dilaserve.errors import OURS
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.step_cost import StepCost
from dilaserve.scheduler.arrivals import Seen, Traffic
from dilaserve.scheduler.batching import Batcher
from dilaserve.scheduler.deadlines import Deadlines
from dilaserve.scheduler.estimates import Estimates
from dilaserve.scheduler.expiry import Expiry
from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.placement import ARRIVAL, Placement, turn
from dilaserve.scheduler.plan_change import PlanState, plan_of
from dilaserve.scheduler.recent_minimum import RecentMinimum
from dilaserve.scheduler.request_state import Phase, RequestState, Transition
from dilaserve.scheduler.rules.admission import beyond_hope, place_in, retry_after
from dilaserve.scheduler.rules.best_effort import STEP, may_lead
from dilaserve.scheduler.rules.composition import Candidate, within
from dilaserve.scheduler.rules.demand import alone, ends
from dilaserve.scheduler.rules.thresholds import ThresholdChoice, ThresholdQuery, crowding
from dilaserve.scheduler.totals import Fate, Totals
from dilaserve.types import (
    Adjust,
    Arrival,
    Cancel,
    Command,
    Decline,
    Demand,
    Emit,
    Event,
    Fail,
    Finish,
    FinishReason,
    Full,
    InstanceLost,
    InstanceReady,
    Kill,
    Launch,
    Moves,
    Paused,
    Plan,
    PlanReady,
    Refuse,
    Release,
    Replan,
    Request,
    Reshaped,
    Reshard,
    RowResult,
    Solve,
    StepDone,
    WorkerLost,
    WorkerUp,
)

log = logging.getLogger(__name__)
TICK = 0.25  # seconds between two passes over all waiting requests
SOLVE_EVERY = 2.0  # seconds between two questions to the planner
SOLVE_SOON = 1.0  # the same, in the first seconds of the first traffic: the plan was made for none
BEST_EFFORT_PLACES = 0.75  # of --max-queue, which requests without an admitted deadline take while deadlines come
MOST_ENDS = 32  # requests that one decision declines at their deadline, and as many that it gives up; about 30 µs each
LATELY = 30.0  # seconds for which a deadline counts as one of those that come
MOVE_PATIENCE = 1.0  # seconds that rows of an old plan wait for its new instances, before they go on where room is
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
        self.batcher = Batcher(config, self.placement, self.estimates, repeats)
        self.requests: dict[str, RequestState] = {}
        self.returning: list[float] = []  # when those who were refused may try again, a heap
        self.ends: tuple[float, list[float]] = (-NEVER, [])  # when running rows are expected to end, and as of when
        self.expiry = Expiry()  # of requests whose client does not want the answer late
        self.most_best_effort = policy.best_effort_backlog, BEST_EFFORT_PLACES * policy.max_queue
        self.tightest = RecentMinimum(LATELY)  # seconds from arrival to deadline
        self.plan_state = PlanState(plan, degrees, policy.step_timeout)
        self.traffic = Traffic()
        self.solves, self.solving, self.solve_at = solves, False, 0.0
        self.move_by = NEVER  # when rows of an old plan wait no longer
        self.ticked_at = self.decided_at = -NEVER
        self.gives_up = False  # more requests have become hopeless than one decision looks at
        self.overdue_at = NEVER  # no step in flight counts as hung before
        self.totals = Totals()
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
                    yield from self.gone(loser, Refuse(loser.request, self.place_in(now)), now, "refused")
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
                self.paused(seconds)
            case Replan(plan, reason):
                self.solves = plan is None
                self.replan(plan or self.plan_state.wanted, reason, now)
            case PlanReady(plan, reason):
                self.solving = False
                if self.solves and plan is not None and plan != self.plan_state.wanted:
                    self.replan(plan, reason, now)

    def decide(self, now: float) -> Iterator[Command]:
        """What is due now, step by step: ends first, then the plan, then placement, then batches for idle instances."""
        self.decided_at = now
        yield from self.decline_expired(now)
        yield from self.change_plan(now)
        self.resume_moved_rows(now)
        yield from self.kill_hung(now)
        yield from self.ask_planner(now)
        ticks = self.ticks(now)
        yield from self.give_up_hopeless(now, ticks)
        if ticks:
            self.tick(now)
        self.placement.place(now, everywhere=ticks)
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
            yield from self.decline(state, now)

    def resume_moved_rows(self, now: float) -> None:
        """Rows of an old plan whose instances do not come in time go on wherever there is room."""
        if self.placement.moving and (now >= self.move_by or not (self.placement.closing or self.plan_state.forming)):
            moved_rows, self.placement.moving = self.placement.moving, []
            self.placement.wait_again(moved_rows)

    def ask_planner(self, now: float) -> Iterator[Command]:
        if now >= self.solve_at and self.asks:
            yield self.solve(now)

    def launch_idle(self, now: float) -> Iterator[Command]:
        """The next batch of each instance that has rows and no step in flight."""
        for replica in self.placement.replicas.values():
            if replica.in_flight is None and replica.residents:
                yield from self.launch(replica, now)

    def complete_change(self, now: float) -> Iterator[Command]:
        """Report a plan once its instances stand."""
        complete = self.plan_state.change and not self.placement.closing
        if complete and (change := self.plan_state.completed(self.placement.instances(), now)):
            self.traffic.changed(now)
            yield Reshaped(change)
            if self.plan_state.whole:
                yield from self.fail_large(now)

    @property
    def plan(self) -> Plan:
        """The instances that there are."""
        return plan_of(self.placement.instances())

    @property
    def asks(self) -> bool:
        """Whether the planner will be asked again: not while it thinks, nor while a change is under way."""
        return self.solves and not self.solving and self.plan_state.change is None

    def wake_at(self) -> float:
        """When to decide again even if nothing happens: for requests that wait or reach their deadline, for a step that
        hangs, for the planner.
        """
        tick_at = self.ticked_at + TICK if self.placement.queue or self.deadlines.floor else NEVER
        solve_at = self.solve_at if self.asks else NEVER
        if self.gives_up or self.placement.places_more or (self.deadlines.admits and self.placement.queue.untested):
            return self.decided_at  # a decision looks at only so many
        move_by = self.move_by if self.placement.moving else NEVER
        return min(tick_at, self.plan_state.form_by, self.next_overdue(), self.expiry.next_at(), solve_at, move_by)

    def next_overdue(self) -> float:
        """When the first of the steps in flight counts as hung."""
        return min([replica.overdue_at for replica in self.placement.all_replicas()], default=NEVER)

    # the plan

    def replan(self, plan: Plan | None, reason: str, now: float) -> None:
        self.plan_state.asked(now, self.placement.instances(), reason)
        self.plan_state.wanted = plan

    def change_plan(self, now: float) -> Iterator[Command]:
        """Close the instances that are not of the plan, as soon as their step is done, and open those that are missing.

        Instances of both plans are not touched.
        """
        if not self.plan_state.needs_reshape:
            return
        self.plan_state.needs_reshape = False
        if self.plan_state.wanted is None:
            self.plan_state.change = None
            return
        groups, ends = set(self.plan_state.target().groups), []
        for id, replica in list(self.placement.closing.items()):
            if replica.instance.ranks in groups and not replica.doomed:
                self.placement.replicas[id] = self.placement.closing.pop(id)
        for id, replica in list(self.placement.replicas.items()):
            if replica.instance.ranks not in groups or replica.doomed:
                self.placement.closing[id] = self.placement.replicas.pop(id)
        for id, replica in list(self.placement.closing.items()):
            if replica.in_flight is None:
                yield from self.vacate(self.placement.closing.pop(id), now)
                ends.append(id)
        self.placement.instances_changed()
        there = [*self.placement.instances(), *self.plan_state.forming.values()]
        begins = self.plan_state.begun({rank for instance in there for rank in instance.ranks}, now)
        if ends or begins:
            yield Reshard(Moves(tuple(ends), tuple(begins)))

    def vacate(self, replica: InstanceState, now: float) -> Iterator[Command]:
        """The instance goes between two steps: its rows keep all committed tokens and lose their K/V.

        For a moment they wait for the new instances rather than crowd the old ones that stay.
        """
        if not self.placement.moving:
            self.move_by = now + MOVE_PATIENCE
        rows = list(replica.residents.values())
        if ends := [row.stepped_at for row in rows if row.steps]:
            self.plan_state.stopped |= dict.fromkeys(replica.instance.ranks, max(ends))
        for state in rows:
            yield from self.contained(state, self.vacated(state, replica))
        self.placement.moving += [state for state in rows if state.phase is Phase.WAITING]

    def vacated(self, state: RequestState, replica: InstanceState) -> Iterator[Command]:
        self.placement.unassign(state, replica)
        state.did(Transition.EVICTED)
        yield from ()

    def kill_hung(self, now: float) -> Iterator[Command]:
        """Give up on instances whose step takes many times as long as predicted, or that do not come up."""
        if now < self.overdue_at and now < self.plan_state.form_by:
            return
        for replica in self.placement.all_replicas():
            if now >= replica.overdue_at:
                self.batcher.hung(replica, now)
                yield Kill(replica.instance.id, f"no answer to a step for {now - replica.launched_at:.3g} s")
        self.overdue_at = self.next_overdue()
        for id in self.plan_state.overdue(now):
            yield Kill(id, "the instance was not formed in time")

    def solve(self, now: float) -> Solve:
        self.solving, self.solve_at = True, now + (SOLVE_SOON if self.traffic.begins(now) else SOLVE_EVERY)
        met, ended = self.traffic.outcome(now)
        demand = Demand(
            seconds=self.traffic.seconds(now),
            flows=self.traffic.flows(now),
            backlog=len(self.placement.queue) + len(self.placement.waiting),
            plan=self.plan_state.wanted or self.plan,
            ranks=tuple(sorted(self.plan_state.workers)),
            degrees=self.plan_state.degrees,
            met=met,
            ended=ended,
        )
        return Solve(demand)

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
        if self.solves:
            if self.traffic.since is None:
                self.solve_at = min(self.solve_at, now + SOLVE_SOON)
            self.traffic.arrived(self.seen(state, now))
        self.requests[request.id] = state
        self.totals.received += 1
        state.has_deadline = state.deadline is not None
        rejects = state.has_deadline and slo.on_miss == "reject" and not self.admissible(state, now)
        self.placement.enter(state)
        state.seconds = self.estimates.unloaded(state)
        self.placement.backlog.add(state)
        if rejects:
            yield from self.decline(state, now)
        elif self.is_too_much(state, now):
            yield from self.gone(state, Refuse(request, self.place_in(now)), now, "refused")
        elif self.deadlines.sheds and state.deadline is not None and slo.on_miss != "best_effort":
            self.expiry.add(state, state.deadline, len(self.requests))

    def is_too_much(self, state: RequestState, now: float) -> bool:
        """Whether the request would be best effort, while deadlines come and more of that waits than will be done."""
        if not self.deadlines.admits or self.tightest.at(now) == NEVER:
            return False
        devices = sum(replica.degree for replica in self.placement.replicas.values())
        seconds, requests = self.most_best_effort
        if (
            self.placement.backlog.best_effort <= seconds * max(1, devices)
            and self.placement.backlog.requests <= requests
        ):
            return False
        if not state.has_deadline:
            return True
        return state.request.slo.on_miss == "best_effort" and not self.admissible(state, now)

    def admissible(self, state: RequestState, now: float) -> bool:
        """Whether an instance takes a newcomer with a deadline, or may do so as soon as a change of plan is done."""
        placement = self.placement
        if not self.deadlines.admits or (not placement.replicas and (placement.closing or self.plan_state.forming)):
            return True
        return placement.any_with_slack(state, now) or placement.tries(state, now)

    def decline(self, state: RequestState, now: float) -> Iterator[Command]:
        """The deadline cannot be met, or has passed: tell the client, now."""
        yield from self.gone(state, self.declined(state, now), now, "declined")

    def declined(self, state: RequestState, now: float) -> Decline:
        request, usage = state.request, state.usage(now)
        if state.steps:
            return Decline(request, usage, None)
        wait = retry_after(self.placement.backlog.timed, len(self.placement.replicas))
        return Decline(request, usage, wait, self.deadlines.is_never_feasible(state))

    def seen(self, state: RequestState, now: float) -> Seen:
        """The arrival as planning sees it."""
        request, tightness = state.request, None
        if state.deadline is not None:
            tightness = (state.deadline - request.arrived_at) / max(1e-9, self.estimates.unloaded(state))
        return Seen(now, request.canvas_tokens, request.max_tokens, tightness)

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

    def gone(self, state: RequestState, farewell: Command, now: float, fate: Fate) -> Iterator[Command]:
        """The one way in which requests end: the client hears now; the row is free now, or after its step in flight."""
        self.placement.leave(state)
        self.placement.backlog.remove(state)
        state.did(Transition.ENDED)
        self.settle_bank(state, fate)
        words = [farewell, self.release(state)] if state.phase is Phase.GONE else [farewell]
        self.account(state, now, fate)
        del self.requests[state.request.id]  # last: while it is known, an error here still ends it as failed
        yield from words

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

    def settle_bank(self, state: RequestState, fate: Fate) -> None:
        """The tenant's accuracy bank pays for an answer, and for a part of one that its client keeps."""
        self.deadlines.ledger.reserve(state, 0.0)
        if fate == "answered":
            self.deadlines.ledger.charge(state)
        elif fate in ("cancelled", "failed") and (given := state.prefix - state.request.prompt_tokens) > 0:
            self.deadlines.ledger.charge(state, min(1.0, given / state.request.max_tokens))

    def account(self, state: RequestState, now: float, fate: Fate) -> None:
        """Count the request's fate, once, and the device seconds spent on it."""
        met = None if state.deadline is None else fate == "answered" and now <= state.deadline
        state.wasted = met is False and fate != "cancelled"
        if self.solves and met is not None and fate != "cancelled":
            self.traffic.ended(state.request.arrived_at, met, now)
        self.totals.ended(fate, met)
        self.totals.spent(state.device, state.wasted)

    def release(self, state: RequestState) -> Release:
        """Take the row off its instance, if it is on one, and free it."""
        if state.replica:
            self.placement.unassign(state, state.replica)
        return Release(state.request.row)

    def paused(self, seconds: float) -> None:
        """What is under way gets the time again, and its step teaches nothing of what steps cost."""
        for replica in self.placement.all_replicas():
            if replica.in_flight is not None:
                replica.overdue_at += seconds
                replica.launched_at += seconds
                replica.disturbed = True
        self.plan_state.paused(seconds)
        self.overdue_at = self.next_overdue()

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
            told = "the request failed twice on our side; it was given up"
            why = f"in flight at two lost workers in a row, the last: {reason}"
            yield from self.gone(state, Fail(state.request, why, told), now, "failed")
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
                told = f"a canvas of {tokens} tokens has no place any more: a worker came back with less memory"
                yield from self.gone(state, Fail(state.request, told, f"{told}; lower max_tokens"), now, "failed")

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
        """Give up on requests that wait and can no longer end in time: at a tick, or if the last decision left some.

        As many as there are instances without deadlines are kept: they are tried there, as estimates may err. That a
        deadline has passed is no estimate, and holds while what steps cost is a guess.
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
                    yield from self.give_up(state, now)
                    continue
            again = max(now + TICK, self.deadlines.hopeless_at(state))
            hopeless.add(state, again, len(self.requests))
        self.gives_up = hopeless.next_at() <= now

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
        return self.place_in(now)

    def place_in(self, now: float) -> float:
        while self.returning and self.returning[0] <= now:
            heappop(self.returning)
        if not self.ends[0] <= now < self.ends[0] + TICK:
            self.ends = now, self.running_ends()
        seconds = place_in(self.ends[1], len(self.returning) + 1)
        heappush(self.returning, now + seconds)
        return seconds

    def running_ends(self) -> list[float]:
        """Seconds until each of the rows on instances is done, as is believed."""
        found: list[float] = []
        for replica in self.placement.all_replicas():
            rows = [row for row in replica.residents.values() if row.phase is not Phase.LEAVING]
            loads = [self.estimates.loads(row, replica.degree)[row.level] for row in rows]
            found += ends(loads, self.estimates.pace(replica.degree).fixed)
        return found

    # steps

    def launch(self, replica: InstanceState, now: float) -> Iterator[Command]:
        degree, pace = replica.degree, self.estimates.pace(replica.degree)
        if self.deadlines.rank_moves:
            replica.with_deadline.sort(key=self.deadlines.rank)
        queries = [self.deadlines.query(state, now, degree) for state in replica.with_deadline]
        if self.deadlines.sheds:
            sure = self.deadlines.shed
            needs = [alone(query.loads[query.deepest], pace.fixed) if sure else 0.0 for query in queries]
            if lost := beyond_hope([query.left for query in queries], needs):
                for state in [replica.with_deadline[place] for place in lost]:
                    yield from self.give_up(state, now)
                if not replica.residents:
                    return
                queries = [query for place, query in enumerate(queries) if place not in lost]
        choices = self.choices(replica, queries)
        replica.late = sum(choice.late for choice in choices.values())
        replica.crowding = crowding([query.loads[0] for query in queries], pace.fixed)
        found = self.candidates(replica, choices, now)
        if self.deadlines.admits and replica.with_deadline:  # deadlines that were admitted go before shares
            candidates = self.batcher.keeping(replica, found)
        else:
            if self.deadlines.admits:
                found = within(found, STEP * self.tightest.at(now))
            sure = self.estimates.sure((degree,))
            candidates = self.batcher.shared(replica, found) if sure else self.batcher.fitting(found)
        if len(candidates) > 1:
            candidates.sort(key=lambda one: (one.tokens, replica.residents[one.key].request.canvas_tokens))
        for candidate in candidates:
            state = replica.residents[candidate.key]
            choice = choices.get(state.request.row)
            if choice or state.level or state.table_threshold != state.thresholds[0]:
                self.apply_threshold(state, choice)
                if state.table_threshold != (threshold := state.threshold):
                    state.table_threshold = threshold
                    yield Adjust(state.request.row, threshold)
        batch = self.batcher.begin(replica, candidates, now)
        self.overdue_at = min(self.overdue_at, replica.overdue_at)
        if self.plan_state.stopped:
            self.plan_state.resumed(replica.instance.ranks, now)
        yield Launch(batch)

    def choices(self, replica: InstanceState, queries: Sequence[ThresholdQuery]) -> dict[int, ThresholdChoice]:
        """Threshold choices by row, of rows with deadlines."""
        rows = [state.request.row for state in replica.with_deadline]
        return dict(zip(rows, self.deadlines.choices(queries, replica.degree), strict=True)) if rows else {}

    def candidates(self, replica: InstanceState, choices: Mapping[int, ThresholdChoice], now: float) -> list[Candidate]:
        """In the order of service."""
        found, degree = [], replica.degree
        for state in quarantined(self.served(replica, now)):
            ready = state.ready  # most of many rows are not in the step, and are as they were: no call for those
            if ready is None or ready.degree != degree:
                ready = self.batcher.ready(state, degree)
            candidate = ready.candidate
            if choices and (choice := choices.get(candidate.key)):
                candidate = Candidate(candidate.key, candidate.tokens, candidate.seconds, choice.slack)
            found.append(candidate)
        return found

    def served(self, replica: InstanceState, now: float) -> list[RequestState]:
        """Who may step, in the order of service.

        Rows with admitted deadlines go before the others. Of these one leads the step now and then, as far as their
        share of device time allows; those that reuse their K/V ride where deadlines have time to spare.
        """
        rows = replica.residents.values()
        if not self.deadlines.admits:
            return self.served_unadmitted(replica, now)
        rest = sorted([row for row in rows if not row.has_deadline], key=turn)
        if not replica.with_deadline:
            return rest
        lead = rest[:1] if may_lead(replica.saved) else []
        ride = [row for row in rest[len(lead) :] if not self.batcher.ready(row, replica.degree).work.refresh]
        return [*lead, *replica.with_deadline, *ride]

    def served_unadmitted(self, replica: InstanceState, now: float) -> list[RequestState]:
        """The same where deadlines are not tested: one order for all, but for one row that has aged."""
        rows, rank = replica.residents.values(), self.deadlines.rank
        oldest = min([row for row in rows if not row.has_deadline], key=ARRIVAL, default=None)
        if oldest and not self.placement.aged(oldest, now):
            oldest = None
        return sorted(rows, key=lambda row: (row is not oldest, row.late, rank(row), turn(row)))

    def apply_threshold(self, state: RequestState, choice: ThresholdChoice | None) -> None:
        """The threshold of the row's next step, and what it may cost."""
        level = min(choice.level, self.deadlines.ledger.deepest(state)) if choice else 0  # rows before it may have paid
        state.level = level
        if len(state.thresholds) > 1:
            spent, spends = state.drop, state.drops[level] if level else 0.0
            self.deadlines.ledger.reserve(state, spends if spends > spent else spent)


def failed(request: Request, error: Exception) -> Fail:
    """The last word on a request whose handling has raised."""
    return Fail(request, f"its handling raised {type(error).__name__}: {error}", OURS, error)


def quarantined(rows: list[RequestState]) -> list[RequestState]:
    """Without suspects all, else the first of these alone."""
    suspects = [row for row in rows if row.suspect]
    return suspects[:1] or rows
