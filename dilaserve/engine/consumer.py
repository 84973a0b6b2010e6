"""The one consumer of events: it asks the scheduler what to do, and does it. It has the clock; it decides nothing."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from dilaserve.engine.alarm import Alarm
from dilaserve.engine.counters import Profile
from dilaserve.engine.delivery import Delivery, full
from dilaserve.engine.doorbell import Bell
from dilaserve.engine.observer import Observer
from dilaserve.engine.plan_changes import PlanChanges
from dilaserve.engine.stall_detector import StallDetector
from dilaserve.engine.stream import Stream
from dilaserve.errors import Overloaded, RequestFailed, Unavailable
from dilaserve.executor.executor import Executor
from dilaserve.scheduler.containment import Guard
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import (
    PAGE,
    Adjust,
    Arrival,
    Command,
    Decline,
    Demand,
    Denoised,
    Emit,
    Event,
    Fail,
    Finish,
    Full,
    InstanceLost,
    InstanceReady,
    Kill,
    Launch,
    Paused,
    Quote,
    Refuse,
    Release,
    Request,
    Reshaped,
    Reshard,
    Slo,
    Solve,
    StepDone,
    StopEarly,
    WorkerLost,
    WorkerUp,
)

log = logging.getLogger(__name__)


class Consumer:
    """Events in, commands out, on one loop.

    `ask` starts a question to the planner. `idle` is set while no row of the table is taken.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        table: RequestTable,
        streams: dict[str, Stream],
        profile: Profile,
        ask: Callable[[Demand], None],
        idle: asyncio.Event,
        places: int,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.scheduler, self.executor, self.table, self.profile = scheduler, executor, table, profile
        self.ask, self.idle, self.places = ask, idle, places
        self.guard = Guard(scheduler)
        self.loop = asyncio.get_running_loop()
        self.inbox: deque[Event] = deque()
        self.bell = Bell()
        self.alarm = Alarm(self.bell)
        self.stall_detector = StallDetector(self.loop)
        self.delivery = Delivery(streams, table, self.post, self.inbox.append, places, observers, self.loop.time)
        self.changes = PlanChanges(profile)
        self.free = deque(range(table.rows))  # rows of the table; the one that has been free for longest goes first
        self.capacity: dict[int, int] = {}  # K/V tokens of the instances that are up
        self.pools: dict[int, int] = {}  # K/V tokens of the workers that are up, at degree 1
        self.broken: Exception | None = None  # ends the engine as soon as the consumer sees it

    def post(self, event: Event) -> None:
        """Put an event into the inbox; from the loop's thread only."""
        self.inbox.append(event)
        self.bell.ring()

    async def run(self) -> None:
        """Every event is observed, then idle instances get their next step."""
        bell, scheduler, profile = self.bell, self.scheduler, self.profile
        while True:
            await bell.wait()
            if self.broken:
                raise self.broken
            now = max(self.loop.time(), self.alarm.rang_at)
            if paused := self.stall_detector.missed(now):
                log.warning("the engine did not run for %.1f s; steps under way get that time again", paused)
                self.inbox.appendleft(Paused(paused))
            self.observe(now)
            began = time.perf_counter()
            commands = list(self.guard.decide(now))
            profile.deciding += time.perf_counter() - began
            profile.decisions += 1
            for command in commands:
                self.perform(command)
            self.wake_at(scheduler.wake_at())

    def observe(self, now: float) -> None:
        """Take in every event that has come."""
        while self.inbox:
            event = self.inbox.popleft()
            self.note(event)
            for command in self.guard.observe(event, now):
                self.perform(command)
            if isinstance(event, Arrival) and (stream := self.delivery.streams.get(event.request.id)):
                stream.seen.ring()

    def wake_at(self, when: float) -> None:
        """Decide again at that time, even if no event comes."""
        if when != self.alarm.at:
            self.alarm.set(when)
            self.stall_detector.watch(when < math.inf)

    def note(self, event: Event) -> None:
        """What the engine itself remembers of an event."""
        match event:
            case StepDone():
                self.profile.steps += 1
                self.profile.rows += len(event.results)
                self.profile.seconds += event.seconds
                self.profile.forward += event.forward
                self.delivery.learn(event.results)
            case InstanceReady(instance):
                self.capacity[instance.id] = instance.kv_tokens
            case InstanceLost(instance):
                self.capacity.pop(instance, None)
            case WorkerUp(rank, kv_tokens):
                self.pools[rank] = kv_tokens
            case WorkerLost(rank):
                self.profile.workers_lost += 1

    def perform(self, command: Command) -> None:
        match command:
            case Launch(batch):
                self.executor.launch(batch)
            case StopEarly(batch):
                self.executor.stop_early(batch)
            case Adjust(row, threshold):
                self.table.set_threshold(row, threshold)
            case Reshard(moves):
                for id in moves.ends:
                    self.capacity.pop(id, None)
                self.changes.moved = True
                self.executor.reshard(moves)
            case Reshaped(change):
                self.changes.completed(change)
            case Kill(instance, reason):
                self.executor.kill(instance, reason)
            case Solve(demand):
                self.ask(demand)
            case Emit() | Denoised() | Finish() | Fail() | Decline() | Refuse():
                self.delivery.deliver(command)
            case Release(row):
                self.free.append(row)
                if len(self.free) == self.table.rows:
                    self.idle.set()

    # rows

    def take_row(self, slo: Slo) -> int:
        """A free row of the table; when all are taken, that of a tenant with more waiting. Raises `Overloaded`."""
        try:
            return self.free_row(slo)
        except (Overloaded, RequestFailed):
            raise
        except Exception as error:  # the work is the consumer's, and would have ended it
            self.broken = error
            self.bell.ring()
            raise Unavailable("the engine has stopped") from error

    def free_row(self, slo: Slo) -> int:
        now = self.loop.time()
        if not self.free:
            self.observe(now)  # an event in the inbox may free a row
        if not self.free:
            for command in self.guard.observe(Full(slo.tenant), now):
                self.perform(command)
        if not self.free:
            timed = slo.seconds is not None or slo.multiple is not None
            raise full(self.places, self.scheduler.refused(timed, now))
        return self.free.popleft()

    def quote(self, request: Request) -> Quote:
        """What the scheduler would say of the request, and whether there is a row for it."""
        return self.scheduler.quotes.quote(request, self.loop.time(), has_row=bool(self.free))

    def smallest_pool(self, smallest_degree: int) -> int:
        """K/V tokens that each instance has under any plan, so that rows fit on instances after a change of plan."""
        return min(self.pools.values()) // PAGE * PAGE * smallest_degree
