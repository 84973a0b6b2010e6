"""The engine: one inbox, one consumer; requests in, streams of text out. It has the clock and knows no device."""

import asyncio
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

import numpy as np

from dilaserve.config import Config
from dilaserve.engine.alarm import Alarm
from dilaserve.engine.assembly import Assemble, ModelCard, real
from dilaserve.engine.capacity import Capacity
from dilaserve.engine.delivery import Delivery
from dilaserve.engine.doorbell import Bell
from dilaserve.engine.offload import Offload
from dilaserve.engine.plan_changes import PlanChanges, PlannerQuestions
from dilaserve.engine.profile import Profile
from dilaserve.engine.prompts import Prompt, conversation, is_conversation, listed, token_ids
from dilaserve.engine.stall_detector import StallDetector
from dilaserve.engine.stream import Chunk, Completion, Cut, Stream, collect
from dilaserve.engine.submit import Options, ResolvedOptions, parse_classes, resolve, validated, wanted
from dilaserve.errors import (
    BadRequest,
    ConfigError,
    Overloaded,
    RequestFailed,
    Unavailable,
    quoted,
)
from dilaserve.executor.executor import Executor, Progress
from dilaserve.planner.planner import PlannerPort
from dilaserve.plans import checked, parsed
from dilaserve.scheduler.containment import Guard
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.tokenizer.tokenizer import MARKS
from dilaserve.transport.devices import steps_for
from dilaserve.types import (
    Adjust,
    Arrival,
    Cancel,
    Change,
    Command,
    Decline,
    Demand,
    Emit,
    Ending,
    Event,
    Fail,
    Finish,
    Full,
    Kill,
    Launch,
    Paused,
    Plan,
    Refuse,
    Release,
    Replan,
    Request,
    Reshaped,
    Reshard,
    Slo,
    Solve,
    StopEarly,
)
from dilaserve.validation import converted, plain

__all__ = ["Chunk", "Completion", "Engine", "ModelCard", "Options", "Profile", "Prompt", "Stream"]

log = logging.getLogger(__name__)
NO_CHOICE = "instances of one size are all that there can be"


class Engine:
    """Serves one model inside a running asyncio loop: `async with Engine(config) as engine`.

    Several engines may live in one process. Entering loads the model and raises `ConfigError` when that cannot work;
    leaving cancels what still runs and ends the workers. `assemble` provides what it works with; the simulator has
    its own. `planner` is asked now and then, off the loop, whether another plan would be better, if --plan is auto;
    without one, the planner that `assemble` provides.

    All methods are for the event loop that entered the engine. `DilaServe` does the same for programs without one.

    An engine that is entered has these attributes: `model` (its name, length and size), `config`, `devices`,
    `degrees` (how many devices may run the model together), `profile` (where time went), `history` (changes of plan),
    `advice` (what the user should hear at the start, or None), and `failure` (the error that ended it, or None).
    """

    def __init__(
        self,
        config: Config | None = None,
        progress: Progress | None = None,
        assemble: Assemble = real,
        planner: PlannerPort | None = None,
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise ConfigError(
                f"config must be a dilaserve.Config, not {type(config).__name__}; write Config.of(devices=…)"
            )
        self.config = config or Config()
        self.assemble = assemble
        self.classes = parse_classes(self.config.scheduler.slo_class)
        self.progress: Progress = progress or (lambda device, done, total: None)
        self.profile = Profile()
        self.draining = False
        self.failure: BaseException | None = None
        self.streams: dict[str, Stream] = {}
        self.planner = planner
        self.capacity = Capacity()
        self.changes = PlanChanges(self.profile)
        self.inbox: deque[Event] = deque()
        self.main: asyncio.Task[None] | None = None
        self.off_loop = Offload()
        self.broken: Exception | None = None  # ends the engine as soon as its consumer sees it
        self.owner = os.getpid()

    # life

    async def __aenter__(self) -> Self:
        if self.main:
            raise Unavailable("an engine is entered once; make another one")
        self.loop, self.owner = asyncio.get_running_loop(), os.getpid()
        self.bell = Bell()
        self.alarm = Alarm(self.loop, self.bell.ring)
        self.stall_detector = StallDetector(self.loop)
        self.idle = asyncio.Event()
        self.idle.set()
        parts = await asyncio.to_thread(self.assemble, self.config, self.progress)
        self.executor, self.table, self.text = parts.executor, parts.table, parts.text
        self.model, self.mask_id, self.vocab_size = parts.model, parts.mask_id, parts.vocab_size
        self.free = deque(range(self.table.rows))  # the row that has been free for longest goes first
        self.devices, self.degrees = parts.devices, parts.degrees
        self.planner = self.planner or parts.planner
        self.unplanned = None if self.planner else parts.unplanned or NO_CHOICE
        wants = parts.unplanned if self.config.device.plan == "auto" and not self.planner else None
        self.advice = advised(parts.note, wants)
        solves = self.planner is not None and self.config.device.plan == "auto"
        steps = steps_for(self.devices, self.config.device)
        self.scheduler = Scheduler(self.config, parts.laws, parts.quality, parts.plan, self.degrees, solves, steps)
        self.guard = Guard(self.scheduler)
        self.delivery = Delivery(self.table, self.streams, self._post, self._full)
        if self.planner:
            self.questions = PlannerQuestions(self.planner, parts.laws, self.scheduler.estimates.known)
        started: asyncio.Future[None] = self.loop.create_future()
        formed = self.changes.next()
        self.main = asyncio.create_task(self._live(self.executor, started), name="dilaserve engine")
        try:
            for stage in (started, formed):
                await asyncio.wait([self.main, stage], return_when=asyncio.FIRST_COMPLETED)
                if not stage.done():
                    self.main.result()
                stage.result()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._leave()

    async def _leave(self) -> None:
        if os.getpid() != self.owner:
            return  # a fork of the program ends, and not the engine
        if self.main:
            self.main.cancel()
            await asyncio.wait([self.main])
        if self.planner:
            await apart(self.planner.close)
        await apart(self.text.close)
        self.off_loop.close()

    async def _live(self, executor: Executor, started: asyncio.Future[None]) -> None:
        """Everything that runs on behalf of this engine, until it is cancelled or broken."""
        try:
            async with asyncio.TaskGroup() as group:
                self.group = group
                group.create_task(self._consume(executor))
                running = asyncio.get_running_loop().create_future()
                group.create_task(executor.run(self._post, running))
                await asyncio.gather(running, asyncio.to_thread(self.text.load_template))
                started.set_result(None)
        except BaseExceptionGroup as broken:
            self.failure = first(broken)
            if not started.done():
                started.set_exception(self.failure)
            else:
                log.error("the engine has stopped", exc_info=self.failure)
        finally:
            self.draining = True
            self.stall_detector.stop()
            for stream in list(self.streams.values()):
                stream.fail(Unavailable("the engine has stopped"))
            self.streams.clear()
            self.changes.fail(self.failure or Unavailable("the engine has stopped"))
            self.idle.set()

    @property
    def ready(self) -> bool:
        """Loaded, not draining, and an instance is up or will be in a moment."""
        return bool(self.capacity.instances or self.scheduler.plan_state.forming) and not self.draining

    @property
    def alive(self) -> bool:
        """Nothing has broken; see `failure` if it has."""
        return self.failure is None

    async def ended(self) -> None:
        """Wait until the engine has stopped, by itself (see `failure`) or because it was left."""
        if self.main:
            await asyncio.wait([self.main])

    async def drain(self, grace: float) -> None:
        """Refuse new requests, and wait until the running ones have ended, `grace` seconds at most.

        What still runs then ends with `Unavailable`.
        """
        self.draining = True
        try:
            async with asyncio.timeout(grace):
                await self.idle.wait()
        except TimeoutError:
            for stream in self.streams.values():
                stream.fail(Unavailable("the server has shut down before the answer was finished", retry_after=5.0))
                self._post(Cancel(stream.id, "cancelled"))

    # the plan

    @property
    def plan(self) -> Plan:
        """Which devices form instances right now; ranks are places in `devices`."""
        return self.scheduler.plan

    @property
    def wanted_plan(self) -> Plan:
        """What the plan becomes as soon as steps in flight are done and lost workers are back."""
        return self.scheduler.plan_state.wanted or self.plan

    async def replan(self, plan: Plan | str, reason: str = "asked for") -> Change:
        """Change the plan, such as "2x1" or `Plan(((0, 1),))`, while requests run; returns when it stands.

        Instances of both plans are not touched, rows of the others wait for one step at most. The plan stays, whatever
        the planner thinks, until another is asked for; "auto" leaves it to the planner again. Raises `BadRequest` for a
        plan that cannot be.
        """
        self._check_running()
        wanted = None if plan == "auto" else self._possible(plan)
        if wanted is None and self.planner is None:
            raise BadRequest(f"there is no planner here: {self.unplanned}; name a plan such as 2x1", param="plan")
        reason = converted(reason, str, "reason")
        stands = self.changes.next()
        self._post(Replan(wanted, reason))
        return await stands

    def _possible(self, plan: Plan | str) -> Plan:
        if isinstance(plan, str):
            return parsed(plan, len(self.devices), self.degrees)
        groups = plan.groups if isinstance(plan, Plan) else plan
        known = Plan(converted(groups, tuple[tuple[int, ...], ...], "plan"))
        return checked(known, len(self.devices), self.degrees)

    @property
    def history(self) -> Sequence[Change]:
        """Changes of the plan, the last 256."""
        return self.changes.history

    async def _ask_planner(self, demand: Demand) -> None:
        self._post(await self.questions.answer(demand))

    # requests

    async def submit(self, prompt: Prompt, options: Options | None = None, *, id: str | None = None) -> Stream:
        """Check the request, give it a row and start it.

        Raises `BadRequest` for what cannot be honoured, `Overloaded` when every row is taken, `DeadlineMissed` when
        the deadline cannot be kept and the client wants to know at once, `Unavailable` while draining.
        """
        self._check_running()
        options = validated(options)
        ids = await self.tokenize(prompt, self.model.max_model_len)
        resolved = resolve(options, len(ids), self.model.max_model_len, secrets.randbits(63), self.config.decode)
        slo = wanted(options, self.classes)
        token_ids(options.stop_token_ids, self.vocab_size, "stop_token_ids")
        self._check_room(resolved)
        id = secrets.token_hex(12) if id is None else plain(converted(id, str, "id"))
        if id in self.streams:
            raise BadRequest(f"a request with the id {quoted(id)} is running; choose another id", param="id")
        stream = self._start(id, ids, resolved, slo, options)
        if slo.on_miss == "reject":
            try:
                await stream.admitted()
            except asyncio.CancelledError:
                await stream.aclose()
                raise
        return stream

    async def generate(self, prompt: Prompt, options: Options | None = None) -> Completion:
        """The whole answer."""
        async with await self.submit(prompt, options) as stream:
            return await collect(stream)

    async def stream(self, prompt: Prompt, options: Options | None = None) -> AsyncIterator[Chunk]:
        """The answer piece by piece, as it becomes final."""
        async with await self.submit(prompt, options) as stream:
            async for chunk in stream:
                yield chunk

    async def tokenize(self, prompt: Prompt, limit: int | None = None) -> list[int]:
        """Token ids of a text, of a conversation (with the mark that opens the answer), or of checked token ids.

        Raises `BadRequest`, also for a text that has more than `limit` tokens for sure.
        """
        self._check_running()
        held = listed(prompt)
        if isinstance(held, str):
            return await self.off_loop(len(held), lambda: self.text.encode(held, limit))
        if is_conversation(held):
            messages = await self.off_loop(MARKS * len(held), lambda: conversation(held, self.text))
            text = await self.text.rendered(messages, limit)
            return await self.off_loop(len(text), lambda: self.text.ids(text, limit, special=False))
        return await self.off_loop(len(held), lambda: token_ids(held, self.vocab_size))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises `BadRequest`."""
        return self.text.decode(token_ids(ids, self.vocab_size, "ids"))

    def _check_running(self) -> None:
        """Raises `Unavailable` for whoever is not where the engine is."""
        if self.main is None:
            raise Unavailable("the engine is not running; enter it with `async with` first")
        if asyncio.get_running_loop() is not self.loop:
            raise Unavailable("the engine lives in another event loop; call it from there, or use dilaserve.DilaServe")

    def _start(self, id: str, ids: list[int], resolved: ResolvedOptions, slo: Slo, options: Options) -> Stream:
        """Give a checked request a row, fill it and tell the scheduler. Raises `Overloaded`."""
        prompt, row = np.array(ids, dtype=np.int32), self._place(slo)
        try:
            generation = self.table.fill(
                row, prompt, resolved.canvas_tokens, self.mask_id, resolved.decoding, ending(options)
            )
            request = Request(
                id=id,
                row=row,
                generation=generation,
                prompt_tokens=len(ids),
                canvas_tokens=resolved.canvas_tokens,
                max_tokens=resolved.max_tokens,
                arrived_at=self.loop.time(),
                decoding=resolved.decoding,
                slo=slo,
            )
            stream = Stream(request, self.text, cutting(options), self._post)
        except BaseException:
            self.free.append(row)
            raise
        self.streams[id] = stream
        self.idle.clear()
        self._post(Arrival(request))
        return stream

    def _check_room(self, resolved: ResolvedOptions) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down; try another", retry_after=5.0)
        if (pool := self.capacity.smallest(self.degrees)) and resolved.canvas_tokens > pool:
            cure = "lower max_tokens" if resolved.max_tokens > resolved.decoding.block_length else "shorten the prompt"
            raise BadRequest(
                f"a canvas of {resolved.canvas_tokens} tokens exceeds the K/V pool of {pool}; "
                f"{cure} or raise --kv-cache-tokens",
                param="max_tokens",
            )

    def _place(self, slo: Slo) -> int:
        """A free row of the table; when all are taken, that of a tenant with more waiting. Raises `Overloaded`."""
        try:
            return self._free_row(slo)
        except (Overloaded, RequestFailed):
            raise
        except Exception as error:  # it would have ended the consumer, whose work this is
            self.broken = error
            self.bell.ring()
            raise Unavailable("the engine has stopped") from error

    def _free_row(self, slo: Slo) -> int:
        now = self.loop.time()
        if not self.free:
            self._observe(self.executor, now)  # what is on its way may free a row
        if not self.free:
            for command in self.guard.observe(Full(slo.tenant), now):
                self._perform(command, self.executor)
        if not self.free:
            timed = slo.seconds is not None or slo.multiple is not None
            raise self._full(self.scheduler.refused(timed, now))
        return self.free.popleft()

    def _full(self, retry_after: float) -> Overloaded:
        limit = self.config.scheduler.max_queue
        return Overloaded(f"all {limit} places (--max-queue) are taken; try again later", retry_after=retry_after)

    # the loop

    def _post(self, event: Event) -> None:
        """Put an event into the inbox; from the loop's thread only."""
        self.inbox.append(event)
        self.bell.ring()

    async def _consume(self, executor: Executor) -> None:
        """The one consumer: every event is observed, then idle instances get their next step."""
        bell, scheduler, profile = self.bell, self.scheduler, self.profile
        while True:
            await bell.wait()
            if self.broken:
                raise self.broken
            now = self.alarm.now()
            if paused := self.stall_detector.missed(now):
                log.warning("the engine did not run for %.1f s; steps under way get that time again", paused)
                self.inbox.appendleft(Paused(paused))
            self._observe(executor, now)
            began = time.perf_counter()
            commands = list(self.guard.decide(now))
            profile.deciding += time.perf_counter() - began
            profile.decisions += 1
            for command in commands:
                self._perform(command, executor)
            self.alarm.set(wake_at := scheduler.wake_at())
            self.stall_detector.watch(wake_at < math.inf)

    def _observe(self, executor: Executor, now: float) -> None:
        """Take in every event that has come."""
        while self.inbox:
            event = self.inbox.popleft()
            self.profile.count(event)
            self.capacity.note(event)
            for command in self.guard.observe(event, now):
                self._perform(command, executor)
            if isinstance(event, Arrival) and (stream := self.streams.get(event.request.id)):
                stream.seen.ring()

    def _perform(self, command: Command, executor: Executor) -> None:
        match command:
            case Launch(batch):
                executor.launch(batch)
            case StopEarly(batch):
                executor.stop_early(batch)
            case Adjust(row, threshold):
                self.table.threshold[row] = threshold
            case Reshard(moves):
                for id in moves.ends:
                    self.capacity.instances.pop(id, None)
                self.changes.moved = True
                executor.reshard(moves)
            case Reshaped(change):
                self.changes.stands(change)
            case Kill(instance, reason):
                executor.kill(instance, reason)
            case Solve(demand):
                if self.planner:
                    self.group.create_task(self._ask_planner(demand))
            case Emit() | Finish() | Fail() | Decline() | Refuse():
                self.delivery.deliver(command)
            case Release(row):
                self.free.append(row)
                if len(self.free) == self.table.rows:
                    self.idle.set()


async def apart(work: Callable[[], None]) -> None:
    """Blocking work in a thread, or on the spot where the interpreter ends and starts no threads any more."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:
        work()
    else:
        await done


def ending(options: Options) -> Ending:
    return Ending(ignore_eos=options.ignore_eos, stop_ids=options.stop_token_ids, min_tokens=options.min_tokens)


def cutting(options: Options) -> Cut:
    return Cut(options.stop, options.min_tokens, options.include_stop_str_in_output)


def advised(note: str | None, unplanned: str | None) -> str | None:
    """What the user should hear at the start."""
    return "; ".join(filter(None, [note, unplanned and f"no planner changes the plan: {unplanned}"])) or None


def first(broken: BaseException) -> BaseException:
    """The error at the bottom of nested groups."""
    while isinstance(broken, BaseExceptionGroup):
        broken = broken.exceptions[0]
    return broken
