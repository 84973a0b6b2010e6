"""The state machine between events and commands. It remembers; it has no clock, no device and never waits."""

import math
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence

from dilaserve.beliefs import Beliefs, batch_features
from dilaserve.config import Config
from dilaserve.cost import StepCost
from dilaserve.layout import Layout, plan_of
from dilaserve.policy.admission import Room, Tenant, fits, hopeless, least_loaded, retry_after
from dilaserve.policy.budget import Bank, room, settled
from dilaserve.policy.composition import COMPOSITIONS, Candidate
from dilaserve.policy.demand import alone
from dilaserve.policy.ordering import ORDERS, Place
from dilaserve.policy.thresholds import CONTROLS, Verdict, Wish, fixed_levels, moved
from dilaserve.progress import Did, Progress, Seat, State
from dilaserve.quality import QualityProfile
from dilaserve.terms import (
    Adjust,
    Arrival,
    Batch,
    Cancel,
    Command,
    Decline,
    Demand,
    Emit,
    Event,
    Fail,
    Finish,
    FinishReason,
    Instance,
    InstanceLost,
    InstanceReady,
    Kill,
    Launch,
    Moves,
    Plan,
    PlanReady,
    Release,
    Replan,
    Reshaped,
    Reshard,
    RowResult,
    Solve,
    StepDone,
    WorkerLost,
    WorkerUp,
)
from dilaserve.traffic import Seen, Traffic

TICK = 0.25  # seconds between two looks at the whole house
SOLVE_EVERY = 2.0  # seconds between two questions to the planner
OVERDUE = 20.0  # times what was predicted, after which a step counts as hung
LOOKS = 8  # waiting requests that a decision may test in vain
MAX_TENANTS = 4096  # accuracy banks that are remembered
NEVER = float("inf")
NEW = Bank()


class Totals:
    """Sums since the start that metrics and tests read."""

    def __init__(self) -> None:
        self.device = self.wasted = 0.0  # seconds on all requests that ended, and on those that missed their deadline
        self.met = self.missed = self.declined = 0


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
    ) -> None:
        policy = config.scheduler
        self.beliefs = Beliefs(laws, quality)
        self.layout = Layout(plan, degrees)
        self.traffic = Traffic()
        self.solves, self.solving, self.solve_at = solves, False, 0.0
        self.patience = policy.step_timeout
        self.compose = COMPOSITIONS[policy.scheduling]
        self.order = ORDERS[policy.scheduling]
        self.control = CONTROLS[policy.threshold_control]
        self.moves_floor = policy.threshold_control == "slack+floor"
        self.controls = policy.threshold_control != "fixed"
        self.composes = policy.scheduling == "composed"
        self.sheds = policy.shed == "on"
        self.budget = None if policy.accuracy_budget == "off" else float(policy.accuracy_budget)
        self.least = policy.min_confidence_threshold
        self.age = policy.best_effort_age
        self.max_rows = config.device.max_num_seqs
        self.max_promised = policy.guaranteed_rows
        self.cap = policy.batch_cap or self.max_rows
        self.max_tokens = config.device.max_num_batched_tokens
        self.waiting: list[Progress] = []  # best effort, in order of arrival (lost rows first)
        self.queue: list[Progress] = []  # promised rows without a seat, in order of service
        self.moving: list[Progress] = []  # rows of an old plan that wait for the new one to stand
        self.requests: dict[str, Progress] = {}
        self.seats: dict[int, Seat] = {}
        self.closing: dict[int, Seat] = {}  # instances of an old plan that finish their step in flight
        self.degrees: tuple[int, ...] = (self.beliefs.base,)  # of the seats
        self.banks: dict[str, Bank] = {}
        self.reserved: dict[str, float] = {}
        self.floor = 0
        self.ticked_at = -NEVER
        self.batches = 0
        self.totals = Totals()

    def observe(self, event: Event, now: float) -> Iterator[Command]:
        match event:
            case Arrival():
                yield from self.arrival(event, now)
            case Cancel(id, reason):
                if known := self.requests.get(id):  # it may have ended while the event was on its way
                    yield from self.end(known, reason, now)
            case StepDone():
                yield from self.step_done(event, now)
            case InstanceReady(instance):
                self.layout.forming.pop(instance.id, None)
                self.layout.moot = True
                self.seats[instance.id] = Seat(instance)
                self.reseated()
            case InstanceLost(instance, reason):
                self.layout.forming.pop(instance, None)
                self.layout.moot = True
                if seat := self.seats.pop(instance, None) or self.closing.pop(instance, None):
                    self.reseated()
                    yield from self.evict(seat, reason)
            case WorkerUp(rank, kv_tokens):
                reason = f"worker {rank} is up" if self.layout.next_id else "the start"
                self.layout.asked(now, self.instances(), reason)
                self.layout.workers[rank] = kv_tokens
            case WorkerLost(rank, reason):
                self.layout.asked(now, self.instances(), f"worker {rank} is gone ({reason})")
                self.layout.workers.pop(rank, None)
            case Replan(plan, reason):
                self.solves = plan is None
                self.replan(plan or self.layout.wanted, reason, now)
            case PlanReady(plan, reason):
                self.solving = False
                if self.solves and plan is not None and plan != self.layout.wanted:
                    self.replan(plan, reason, now)

    def decide(self, now: float) -> Iterator[Command]:
        if self.layout.moot:
            yield from self.reshape(now)
        if self.moving and not self.closing and not self.layout.forming:
            moved_rows, self.moving = self.moving, []
            self.wait_again(moved_rows)
        yield from self.watch(now)
        if self.asks and now >= self.solve_at:
            yield self.solve(now)
        ticks = now >= self.ticked_at + TICK and (self.queue or self.admits)
        if ticks:
            yield from self.tick(now)
        self.place(now, everywhere=bool(ticks))
        for seat in self.seats.values():
            if seat.flying is None and seat.residents:
                yield from self.launch(seat, now)
        if self.layout.change and not self.closing and (change := self.layout.settled(self.instances(), now)):
            self.traffic.changed(now)
            yield Reshaped(change)

    @property
    def running(self) -> int:
        """Requests that have a seat."""
        return sum(len(seat.residents) for seats in (self.seats, self.closing) for seat in seats.values())

    @property
    def plan(self) -> Plan:
        """The instances that there are."""
        return plan_of(self.instances())

    def instances(self) -> list[Instance]:
        return [seat.instance for seats in (self.seats, self.closing) for seat in seats.values()]

    @property
    def admits(self) -> bool:
        """Whether arrivals are tested; a guess of what steps cost is no ground to turn anybody away."""
        return self.composes and self.beliefs.sure(self.degrees)

    @property
    def shed(self) -> bool:
        return self.sheds and self.beliefs.sure(self.degrees)

    @property
    def asks(self) -> bool:
        """Whether the planner will be asked again: not while it thinks, nor while a change is under way."""
        return self.solves and not self.solving and self.layout.change is None

    def wake_at(self) -> float:
        """When the house must be looked at even if nothing happens: for those who wait, for a step that hangs, for
        the planner.
        """
        when = self.ticked_at + TICK if self.queue or self.floor else NEVER
        when = min(when, self.layout.form_by)
        for seats in (self.seats, self.closing):
            for seat in seats.values():
                when = min(when, seat.overdue_at)
        return min(when, self.solve_at) if self.asks else when

    # the plan

    def replan(self, plan: Plan | None, reason: str, now: float) -> None:
        self.layout.asked(now, self.instances(), reason)
        self.layout.wanted = plan

    def reshape(self, now: float) -> Iterator[Command]:
        """Close the instances that are not of the plan, as soon as their step is done, and open those that are missing.

        Instances of both plans are not touched.
        """
        self.layout.moot = False
        if self.layout.wanted is None:
            self.layout.change = None
            return
        groups, ends = set(self.layout.target().groups), []
        for id, seat in list(self.closing.items()):
            if seat.instance.ranks in groups:
                self.seats[id] = self.closing.pop(id)
        for id, seat in list(self.seats.items()):
            if seat.instance.ranks not in groups:
                self.closing[id] = self.seats.pop(id)
        for id, seat in list(self.closing.items()):
            if seat.flying is None:
                self.vacate(self.closing.pop(id))
                ends.append(id)
        self.reseated()
        there = [*self.instances(), *self.layout.forming.values()]
        begins = self.layout.begun({rank for instance in there for rank in instance.ranks})
        self.layout.form_by = math.ceil(now + self.patience) if self.layout.forming else NEVER
        if ends or begins:
            yield Reshard(Moves(tuple(ends), tuple(begins)))

    def vacate(self, seat: Seat) -> None:
        """The instance goes between two steps: its rows keep all committed tokens and lose their K/V.

        They wait for the new instances rather than crowd the old ones that stay.
        """
        rows = list(seat.residents.values())
        if ends := [row.stepped_at for row in rows if row.steps]:
            self.layout.stopped |= dict.fromkeys(seat.instance.ranks, max(ends))
        for progress in rows:
            self.unseat(progress, seat)
            progress.did(Did.EVICTED)
            progress.tested = False
        self.moving += rows

    def reseated(self) -> None:
        self.degrees = tuple(sorted({seat.degree for seat in self.seats.values()})) or (self.beliefs.base,)

    def watch(self, now: float) -> Iterator[Command]:
        """Give up on instances whose step takes many times as long as predicted, or that do not come up."""
        for seats in (self.seats, self.closing):
            for id, seat in seats.items():
                if now >= seat.overdue_at:
                    seat.overdue_at = NEVER
                    yield Kill(id, f"no answer to a step for {now - seat.launched_at:.3g} s")
        if now >= self.layout.form_by:
            self.layout.form_by = NEVER
            for id in self.layout.forming:
                yield Kill(id, f"an instance was not formed within {self.patience:g} s")

    def solve(self, now: float) -> Solve:
        self.solving, self.solve_at = True, now + SOLVE_EVERY
        met, ended = self.traffic.outcome(now)
        demand = Demand(
            seconds=self.traffic.seconds(now),
            flows=self.traffic.flows(now),
            backlog=len(self.queue) + len(self.waiting),
            plan=self.layout.wanted or self.plan,
            ranks=tuple(sorted(self.layout.workers)),
            degrees=self.layout.degrees,
            met=met,
            ended=ended,
        )
        return Solve(demand)

    # events

    def arrival(self, event: Arrival, now: float) -> Iterator[Command]:
        request = event.request
        thresholds = self.thresholds_of(event)
        drops, means = self.beliefs.drops(request, thresholds), self.beliefs.mean_drops(request, thresholds)
        progress = Progress(request, thresholds, drops, means)
        slo = request.slo
        if slo.seconds is not None:
            progress.deadline = request.arrived_at + slo.seconds
        elif slo.multiple is not None:
            progress.deadline = request.arrived_at + slo.multiple * self.beliefs.unloaded(progress)
        if self.solves:
            self.traffic.arrived(self.seen(progress, now))
        self.requests[request.id] = progress
        if progress.deadline is None:
            self.waiting.append(progress)
            return
        progress.promised = True
        if (
            slo.on_miss == "reject"
            and self.admits
            and (self.seats or not (self.closing or self.layout.forming))
            and not self.seat_with_slack(progress, list(self.seats.values()), {}, now)
        ):
            del self.requests[request.id]
            progress.did(Did.ENDED)
            self.totals.declined += 1
            if self.solves:
                self.traffic.ended(now, False, now)
            wait = retry_after(self.backlog(), len(self.seats))
            yield Decline(request, progress.usage(now), wait)
            yield Release(request.row)
            return
        insort(self.queue, progress, key=self.rank)

    def seen(self, progress: Progress, now: float) -> Seen:
        """The arrival as planning sees it."""
        request, tightness = progress.request, None
        if progress.deadline is not None:
            tightness = (progress.deadline - request.arrived_at) / max(1e-9, self.beliefs.unloaded(progress))
        return Seen(now, request.canvas_tokens, request.max_tokens, tightness)

    def thresholds_of(self, event: Arrival) -> tuple[float, ...]:
        """The thresholds that control may choose among: the request's own, and lower ones that all sides allow."""
        request = event.request
        own = request.decoding.confidence_threshold
        if not self.controls or request.slo.fixed or request.decoding.rule != "threshold":
            return (own,)
        least = max(self.least, request.slo.floor)
        return (own, *(level for level in self.beliefs.levels if least - 1e-6 <= level < own - 1e-6))

    def step_done(self, event: StepDone, now: float) -> Iterator[Command]:
        seat = self.seats.get(event.instance) or self.closing.get(event.instance)
        if seat is None or seat.batch != event.batch or seat.flying is None:
            return  # the instance was lost after it had sent this
        flying, seat.flying, seat.overdue_at = seat.flying, None, NEVER
        self.layout.moot |= event.instance in self.closing
        self.beliefs.stepped(seat.features, seat.refreshing, event.seconds, now - seat.launched_at, seat.degree)
        for progress, result, share in zip(flying, event.results, seat.shares, strict=True):
            leaving = progress.state is State.LEAVING
            progress.stepped_at = now
            progress.device += share * event.seconds
            progress.did(Did.RETURNED)
            if leaving:
                yield self.release(progress)
            else:
                yield from self.returned(progress, result, now)

    def returned(self, progress: Progress, result: RowResult, now: float) -> Iterator[Command]:
        """A row is back from a step: emit what is final, end it if that is all."""
        request, before = progress.request, progress.prefix
        masks, block = progress.masks, progress.block
        progress.advance(result)
        end = request.prompt_tokens + request.max_tokens
        stopped = 0 <= result.stop_at < result.prefix and not request.ignore_eos
        self.beliefs.watched(progress, masks, block, result.unmasked, stopped)
        prefix = min(result.stop_at if stopped else result.prefix, end)
        if prefix > before:
            yield Emit(request, prefix)
        if stopped and result.stop_at < end:
            yield from self.end(progress, "stop", now)
        elif result.prefix >= end:
            yield from self.end(progress, "length", now)

    def end(self, progress: Progress, reason: FinishReason, now: float) -> Iterator[Command]:
        yield from self.gone(progress, Finish(progress.request, reason, progress.usage(now)), now, reason)

    def gone(self, progress: Progress, farewell: Command, now: float, reason: str) -> Iterator[Command]:
        """The request leaves the house, now or after its step in flight."""
        del self.requests[progress.request.id]
        if progress.state is State.WAITING:
            home = self.queue if progress.promised else self.waiting
            (self.moving if progress in self.moving else home).remove(progress)
        progress.did(Did.ENDED)
        self.account(progress, now, reason)
        yield farewell
        if progress.state is State.GONE:
            yield self.release(progress)

    def account(self, progress: Progress, now: float, reason: str) -> None:
        """Settle with the tenant's bank, and add up what was spent in vain."""
        tenant = progress.request.slo.tenant
        self.reserve(progress, 0.0)
        if reason in ("stop", "length") and self.budget is not None and not progress.request.slo.fixed:
            self.banks[tenant] = settled(self.banks.pop(tenant, NEW), progress.drop, self.budget)
            if len(self.banks) > MAX_TENANTS:
                del self.banks[next(iter(self.banks))]  # who has not been here for the longest time
        totals = self.totals
        totals.device += progress.device
        if progress.deadline is not None and reason != "cancelled":
            met = now <= progress.deadline and reason != "late"
            totals.met += met
            totals.missed += not met
            totals.wasted += 0.0 if met else progress.device
            if self.solves:
                self.traffic.ended(progress.request.arrived_at, met, now)

    def release(self, progress: Progress) -> Release:
        """Give back the row's seat, if it has one, and the row."""
        if progress.seat:
            self.unseat(progress, progress.seat)
        return Release(progress.request.row)

    def unseat(self, progress: Progress, seat: Seat) -> None:
        del seat.residents[progress.request.row]
        if progress in seat.promised:
            seat.promised.remove(progress)
        seat.pages.give(progress.kv_start)
        progress.seat, progress.fresh, progress.loads = None, False, None

    def evict(self, seat: Seat, reason: str) -> Iterator[Command]:
        """The instance is lost: its rows wait again, ahead of the others; they keep all committed tokens.

        Those in flight are suspected of it: the next step of each is taken alone, and if that is lost too, so are they.
        """
        back: list[Progress] = []
        for progress in list(seat.residents.values()):
            state = progress.state
            self.unseat(progress, seat)
            if state is State.STEPPING and progress.suspect:
                del self.requests[progress.request.id]
                self.reserve(progress, 0.0)
                yield Fail(progress.request, f"in flight at two lost workers in a row, the last: {reason}")
                yield Release(progress.request.row)
                continue
            progress.suspect |= state is State.STEPPING
            progress.did(Did.EVICTED)
            if state is State.LEAVING:
                yield Release(progress.request.row)
            else:
                back.append(progress)
        self.wait_again(back)

    def wait_again(self, rows: list[Progress]) -> None:
        """Rows that had a seat go back, ahead of the others of their kind."""
        for progress in rows:
            if progress.promised:
                insort(self.queue, progress, key=self.rank)
        others = [progress for progress in rows if not progress.promised]
        self.waiting[:0] = sorted(others, key=lambda progress: progress.request.arrived_at)

    # deadlines

    def rank(self, progress: Progress) -> float:
        """The order of service; the smallest first."""
        deadline = NEVER if progress.deadline is None else progress.deadline
        seconds = self.beliefs.unloaded(progress) if self.order is ORDERS["least-slack"] else 0.0
        return self.order(Place(progress.request.arrived_at, deadline, seconds))

    def tick(self, now: float) -> Iterator[Command]:
        """Every quarter of a second: give up on hopeless requests that wait, and move the floor of the thresholds."""
        self.ticked_at = now
        if self.shed:
            spare = sum(not seat.promised for seat in self.seats.values())
            for progress in list(self.queue):
                if self.is_hopeless(progress, now):
                    spare -= 1
                    if spare < 0 or self.is_past(progress, now):
                        yield from self.give_up(progress, now)
        if self.moves_floor:
            promised = [progress for seat in self.seats.values() for progress in seat.promised]
            missing = sum(progress.tested for progress in self.queue) + sum(
                verdict.late for _, verdict in self.verdicts_of_all(now)
            )
            total = len(promised) + len(self.queue)
            deepest = min(1, len(self.beliefs.levels) - 1)
            self.floor = moved(self.floor, missing / total if total else 0.0, deepest)

    def verdicts_of_all(self, now: float) -> Iterator[tuple[Progress, Verdict]]:
        for seat in self.seats.values():
            yield from zip(seat.promised, self.verdicts(seat, now), strict=True)

    def verdicts(self, seat: Seat, now: float) -> list[Verdict]:
        """Level and slack of an instance's rows with deadlines, which stand in the order of service."""
        return self.verdicts_on([self.wish(progress, now, seat.degree) for progress in seat.promised], seat.degree)

    def verdicts_on(self, wishes: Sequence[Wish], degree: int) -> list[Verdict]:
        pace = self.beliefs.pace(degree)
        control = self.control if pace.sure else fixed_levels
        return control(wishes, self.floor, pace.fixed)

    def wish(self, progress: Progress, now: float, degree: int) -> Wish:
        left = NEVER if progress.deadline is None else progress.deadline - now
        return Wish(left, self.beliefs.loads(progress, degree), self.deepest(progress))

    def deepest(self, progress: Progress) -> int:
        """The lowest of the row's thresholds that its tenant can pay for."""
        if self.budget is None or len(progress.thresholds) == 1:
            return len(progress.thresholds) - 1
        tenant = progress.request.slo.tenant
        pending = self.reserved.get(tenant, 0.0) - progress.reserved
        most = room(self.banks.get(tenant, NEW), self.budget, pending)
        level = len(progress.thresholds) - 1
        while level and progress.drops[level] > 0.0 and max(progress.drops[level], progress.drop) > most:
            level -= 1
        return level

    def reserve(self, progress: Progress, drop: float) -> None:
        """Let the bank hold back what a running request may still spend."""
        tenant = progress.request.slo.tenant
        total = self.reserved.pop(tenant, 0.0) + drop - progress.reserved
        if total > 1e-9:
            self.reserved[tenant] = total
        progress.reserved = drop

    def is_hopeless(self, progress: Progress, now: float) -> bool:
        """Whether it can end in time on no kind of instance that there is."""
        for degree in self.degrees:
            left, loads, deepest = self.wish(progress, now, degree)
            if not hopeless(left, alone(loads[deepest], self.beliefs.pace(degree).fixed)):
                return False
        return True

    def is_past(self, progress: Progress, now: float) -> bool:
        return progress.deadline is not None and progress.deadline <= now

    def give_up(self, progress: Progress, now: float) -> Iterator[Command]:
        """The deadline cannot be met any more: go on without a promise, or end, as the client wishes."""
        if progress.request.slo.on_miss != "best_effort":
            self.totals.declined += 1
            retry = None if progress.steps else retry_after(self.backlog(), len(self.seats))
            farewell = Decline(progress.request, progress.usage(now), retry)
            yield from self.gone(progress, farewell, now, "late")
            return
        if progress.state is State.WAITING:
            self.queue.remove(progress)
            self.waiting.append(progress)
        elif progress.seat:
            progress.seat.promised.remove(progress)
        progress.promised, progress.late = False, True

    def backlog(self) -> float:
        """Seconds of guaranteed work in the house, as if one after the other."""
        return sum(self.beliefs.unloaded(progress) for progress in self.requests.values() if progress.promised)

    # placing

    def place(self, now: float, everywhere: bool) -> None:
        """Give seats to those who wait: promised rows where their deadline holds, then the others where room is."""
        if self.admits:
            self.place_promised(now, everywhere)
            self.place_rest(self.waiting)
        else:
            merged = sorted(self.queue + self.waiting, key=lambda row: (row.late, self.rank(row)))
            self.place_rest(merged)
            if len(merged) < len(self.queue) + len(self.waiting):
                left = {id(progress) for progress in merged}
                self.queue = [progress for progress in self.queue if id(progress) in left]
                self.waiting = [progress for progress in self.waiting if id(progress) in left]

    def place_promised(self, now: float, everywhere: bool) -> None:
        """Newcomers are tested on every instance, those who failed once on the instances between two steps."""
        idle = [seat for seat in self.seats.values() if seat.flying is None]
        tested: dict[int, list[Tenant]] = {}
        looks = 0
        for progress in list(self.queue):
            if progress.tested and not everywhere and (looks >= LOOKS or not idle):
                continue
            looks += progress.tested
            seats = idle if progress.tested and not everywhere else list(self.seats.values())
            progress.tested = True
            seat = self.seat_with_slack(progress, seats, tested, now)
            if seat is None:
                seat = self.seat_for_hopeless(progress, now)
            if seat is not None and self.make_room(seat, progress):
                self.queue.remove(progress)
                self.seat(progress, seat)
                tested.pop(seat.instance.id, None)

    def seat_for_hopeless(self, progress: Progress, now: float) -> Seat | None:
        """Estimates may be wrong: where nobody has a promise, trying costs nobody anything, and teaches.

        None for a request that is not hopeless: it waits for a seat that keeps its slack.
        """
        seat = min(self.seats.values(), key=lambda seat: len(seat.promised), default=None)
        if seat and self.shed and (seat.promised or self.is_past(progress, now)):
            return None
        return seat if self.is_hopeless(progress, now) else None

    def place_rest(self, rows: list[Progress]) -> None:
        """In order, until one finds no room; removes from `rows` who got a seat."""
        placed = 0
        for progress in rows:
            seat = self.seat_for(progress)
            if seat is None:
                break
            self.seat(progress, seat)
            placed += 1
        del rows[:placed]

    def seat_for(self, progress: Progress) -> Seat | None:
        """The emptiest instance with room for the canvas, whose pages are taken."""
        rooms = [
            Room(seat.instance.id, len(seat.residents), self.max_rows * seat.degree) for seat in self.seats.values()
        ]
        for id in least_loaded(rooms):
            kv_start = self.seats[id].pages.take(progress.request.canvas_tokens)
            if kv_start is not None:
                progress.kv_start = kv_start
                return self.seats[id]
        return None

    def seat_with_slack(
        self, progress: Progress, seats: Sequence[Seat], tenants: dict[int, list[Tenant]], now: float
    ) -> Seat | None:
        """The instance that keeps the most slack, at the highest threshold at which any passes the test.

        `tenants` keeps the rows of the instances that were looked at.
        """
        paces = {degree: self.beliefs.pace(degree).fixed for degree in self.degrees}
        loads = {degree: self.beliefs.loads(progress, degree) for degree in self.degrees}
        left = (progress.deadline or NEVER) - now
        deepest = self.deepest(progress)
        for level in range(min(self.floor, deepest), deepest + 1):
            newcomers = {
                degree: Tenant(left, *loads[degree][level], progress.request.slo.weight) for degree in self.degrees
            }
            found: list[tuple[float, int]] = []
            for seat in seats:
                if len(seat.promised) >= self.max_promised:
                    continue
                if (id := seat.instance.id) not in tenants:
                    tenants[id] = self.tenants(seat, now)
                slack = fits(newcomers[seat.degree], tenants[id], paces[seat.degree])
                if slack is not None:
                    found.append((slack, -id))
            if found:
                return self.seats[-max(found)[1]]
        return None

    def tenants(self, seat: Seat, now: float) -> list[Tenant]:
        rows = []
        for progress in seat.promised:
            need = self.beliefs.loads(progress, seat.degree)[progress.level]
            left = (progress.deadline or NEVER) - now
            rows.append(Tenant(left, need.steps, need.work, progress.request.slo.weight))
        return rows

    def make_room(self, seat: Seat, progress: Progress) -> bool:
        """Take pages and a row, if need be from best-effort rows, the last to come first; their next step refreshes."""
        while True:
            if len(seat.residents) < self.max_rows * seat.degree:
                kv_start = seat.pages.take(progress.request.canvas_tokens)
                if kv_start is not None:
                    progress.kv_start = kv_start
                    return True
            idle = [row for row in seat.residents.values() if row.state is State.RESIDENT and not row.promised]
            if not idle:
                return False
            last = max(idle, key=lambda row: row.request.arrived_at)
            self.unseat(last, seat)
            last.did(Did.EVICTED)
            self.wait_again([last])

    def seat(self, progress: Progress, seat: Seat) -> None:
        progress.did(Did.PLACED)
        progress.seat = seat
        seat.residents[progress.request.row] = progress
        if progress.promised:
            insort(seat.promised, progress, key=self.rank)

    # steps

    def launch(self, seat: Seat, now: float) -> Iterator[Command]:
        fixed = self.beliefs.pace(seat.degree).fixed
        wishes = [self.wish(progress, now, seat.degree) for progress in seat.promised]
        if self.shed:
            needs = [alone(loads[deepest], fixed) for _, loads, deepest in wishes]
            lost = [hopeless(wish.left, seconds) for wish, seconds in zip(wishes, needs, strict=True)]
            if lost and all(lost):  # who is nearest to being in time is tried all the same, as nobody else loses by it
                best = max(range(len(lost)), key=lambda i: wishes[i].left - needs[i])
                lost[best] = wishes[best].left <= 0.0
            if any(lost):
                for progress in [row for row, gone in zip(seat.promised, lost, strict=True) if gone]:
                    yield from self.give_up(progress, now)
                wishes = [wish for wish, gone in zip(wishes, lost, strict=True) if not gone]
                if not seat.residents:
                    return
        verdicts = {
            progress.request.row: verdict
            for progress, verdict in zip(seat.promised, self.verdicts_on(wishes, seat.degree), strict=True)
        }
        candidates = [
            self.candidate(progress, verdicts.get(progress.request.row), seat.degree)
            for progress in quarantined(self.served(seat, now))
        ]
        candidates = self.compose(candidates, self.max_tokens, self.cap)
        candidates.sort(key=lambda one: (one.tokens, seat.residents[one.key].request.canvas_tokens))
        chosen = [seat.residents[candidate.key] for candidate in candidates]
        todo = [progress.next_work() for progress in chosen]
        if verdicts or self.controls:
            for progress in chosen:
                verdict = verdicts.get(progress.request.row)
                if verdict or progress.level or progress.told != progress.thresholds[0]:
                    yield from self.at_level(progress, verdict)
        spans = tuple([progress.span(work) for progress, work in zip(chosen, todo, strict=True)])
        total = fixed + sum([candidate.seconds for candidate in candidates])
        even = fixed / len(chosen)
        seat.shares = [(even + candidate.seconds) / total for candidate in candidates]
        seat.features = batch_features(spans, sum([progress.masks for progress in chosen]))
        seat.refreshing = any(work.refresh for work in todo)
        for progress, work in zip(chosen, todo, strict=True):
            progress.launched(work, now)
        self.batches += 1
        seat.flying, seat.batch, seat.launched_at = chosen, self.batches, now
        seat.overdue_at = math.ceil(now + max(self.patience, OVERDUE * total))
        if self.layout.stopped:
            self.layout.resumed(seat.instance.ranks, now)
        yield Launch(Batch(self.batches, seat.instance.id, spans))

    def candidate(self, progress: Progress, verdict: Verdict | None, degree: int) -> Candidate:
        work = progress.next_work()
        seconds = self.beliefs.step_seconds(progress, work.refresh, degree)
        return Candidate(progress.request.row, work.length, seconds, verdict.slack if verdict else None)

    def served(self, seat: Seat, now: float) -> list[Progress]:
        """Who may step, in the order of service: rows with promises alone if there are any, and one that has aged."""
        rows = seat.residents.values()
        if not self.admits:
            return sorted(rows, key=lambda row: (row.late, self.rank(row), row.request.arrived_at))
        rest = sorted((row for row in rows if not row.promised), key=lambda row: row.request.arrived_at)
        if not seat.promised:
            return rest
        aged = rest[:1] if rest and now - rest[0].request.arrived_at > self.age else []
        return [*aged, *seat.promised]

    def at_level(self, progress: Progress, verdict: Verdict | None) -> Iterator[Adjust]:
        """Settle the threshold of the row's next step, and reserve what it may cost."""
        progress.level = verdict.level if verdict else 0
        threshold = progress.threshold
        if len(progress.thresholds) > 1:
            self.reserve(progress, max(progress.drop, progress.drops[progress.level] if progress.level else 0.0))
        if threshold != progress.told:
            progress.told = threshold
            yield Adjust(progress.request.row, threshold)


def quarantined(rows: list[Progress]) -> list[Progress]:
    """Without suspects all, else the first of these alone."""
    suspect = next((row for row in rows if row.suspect), None)
    return rows if suspect is None else [suspect]
