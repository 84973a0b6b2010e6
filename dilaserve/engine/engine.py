"""The engine: it starts and ends the parts, checks requests and gives each a stream of text. It knows no device."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import numpy as np

from dilaserve.config import Config
from dilaserve.engine.assembly import Assemble, ModelCard, Parts, advised, real
from dilaserve.engine.consumer import Consumer
from dilaserve.engine.counters import Profile
from dilaserve.engine.known_canvas import KnownCanvas
from dilaserve.engine.new_request import Place, new_request
from dilaserve.engine.observer import Observer
from dilaserve.engine.offload import Offload, apart
from dilaserve.engine.planner_client import PlannerClient
from dilaserve.engine.prefix_hashes import PrefixHasher, prefix_hasher
from dilaserve.engine.prompts import Prompt, token_ids
from dilaserve.engine.resume import Resumed, Vocabulary, check_length, resumed
from dilaserve.engine.slo_classes import parse_classes, wanted
from dilaserve.engine.stream import Chunk, Completion, Stream, collect
from dilaserve.engine.submit import Options, ResolvedOptions, check_pool, ending, resolve, validated
from dilaserve.engine.tokenization import Tokenization
from dilaserve.errors import BadRequest, ConfigError, Unavailable, quoted
from dilaserve.executor.executor import Progress
from dilaserve.planner.planner import PlannerPort
from dilaserve.plans import checked, parsed
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.transport.devices import steps_for
from dilaserve.types import Arrival, Cancel, Change, Demand, Plan, Quote, Replan, Slo
from dilaserve.validation import converted, plain

__all__ = ["Chunk", "Completion", "Engine", "KnownCanvas", "ModelCard", "Options", "Profile", "Prompt", "Stream"]

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
    `advice` (what the user should read at the start, or None), `failure` (the error that ended it, or None), and
    `observers`, a list to which watchers of requests may be added.
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
        self.observers: list[Observer] = []
        self.planner = planner
        self.main: asyncio.Task[None] | None = None
        self.off_loop = Offload()
        self.owner = os.getpid()

    # life

    async def __aenter__(self) -> Self:
        if self.main:
            raise Unavailable("an engine is entered once; make another one")
        self.loop, self.owner = asyncio.get_running_loop(), os.getpid()
        self.idle = asyncio.Event()
        self.idle.set()
        self._assembled(await asyncio.to_thread(self.assemble, self.config, self.progress))
        started: asyncio.Future[None] = self.loop.create_future()
        formed = self.changes.next()
        self.main = asyncio.create_task(self._live(started), name="dilaserve engine")
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

    def _assembled(self, parts: Parts) -> None:
        """Take over the parts, and make the scheduler and the consumer."""
        self.executor, self.table, self.text = parts.executor, parts.table, parts.text
        self.model, self.mask_id, self.vocab_size = parts.model, parts.mask_id, parts.vocab_size
        self.tokenization = Tokenization(self.text, self.vocab_size, self.off_loop)
        self.vocabulary = Vocabulary(parts.vocab_size, parts.mask_id, parts.stop_ids)
        self.devices, self.degrees = parts.devices, parts.degrees
        self.planner = self.planner or parts.planner
        self.unplanned = None if self.planner else parts.unplanned or NO_CHOICE
        automatic = self.config.device.planned
        self.advice = advised(parts.note, parts.unplanned if automatic and not self.planner else None)
        steps = steps_for(self.devices, self.config.device)
        solves = automatic and self.planner is not None
        self.scheduler = Scheduler(self.config, parts.laws, parts.quality, parts.plan, self.degrees, solves, steps)
        if self.planner:
            self.planner_client = PlannerClient(self.planner, parts.laws, self.scheduler.estimates)
        self.consumer = Consumer(
            self.scheduler,
            self.executor,
            self.table,
            self.streams,
            self.profile,
            self._ask,
            self.idle,
            self.config.scheduler.max_queue,
            self.observers,
        )
        self.changes, self.history = self.consumer.changes, self.consumer.changes.history

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

    async def _live(self, started: asyncio.Future[None]) -> None:
        """Everything that runs on behalf of this engine, until it is cancelled or broken."""
        try:
            async with asyncio.TaskGroup() as group:
                self.group = group
                group.create_task(self.consumer.run())
                running = asyncio.get_running_loop().create_future()
                group.create_task(self.executor.run(self.consumer.post, running))
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
            self.consumer.stall_detector.stop()
            for stream in list(self.streams.values()):
                stream.fail(Unavailable("the engine has stopped"))
            self.streams.clear()
            self.changes.fail(self.failure or Unavailable("the engine has stopped"))
            self.idle.set()

    @property
    def ready(self) -> bool:
        """Loaded, not draining, and an instance is up or will be in a moment."""
        return bool(self.consumer.capacity or self.scheduler.plan_state.forming) and not self.draining

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
                self.consumer.post(Cancel(stream.id, "cancelled"))

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
        """Change the plan, such as "2x1" or `Plan(((0, 1),))`, while requests run; returns when its instances are up.

        Instances of both plans are not touched, rows of the others wait for one step at most. The plan stays, whatever
        the planner thinks, until another is asked for; "auto" leaves it to the planner again. Raises `BadRequest` for a
        plan that cannot be.
        """
        self._check_running()
        wanted = None if plan == "auto" else self._possible(plan)
        if wanted is None and self.planner is None:
            raise BadRequest(f"there is no planner here: {self.unplanned}; name a plan such as 2x1", param="plan")
        reason = converted(reason, str, "reason")
        done = self.changes.next()
        self.consumer.post(Replan(wanted, reason))
        return await done

    def _possible(self, plan: Plan | str) -> Plan:
        if isinstance(plan, str):
            return parsed(plan, len(self.devices), self.degrees)
        groups = plan.groups if isinstance(plan, Plan) else plan
        known = Plan(converted(groups, tuple[tuple[int, ...], ...], "plan"))
        return checked(known, len(self.devices), self.degrees)

    def _ask(self, demand: Demand) -> None:
        """Ask the planner, if there is one; its answer is an event."""
        if self.planner:
            self.group.create_task(self._answer(demand))

    async def _answer(self, demand: Demand) -> None:
        self.consumer.post(await self.planner_client.answer(demand))

    # requests

    async def submit(self, prompt: Prompt, options: Options | None = None, *, id: str | None = None) -> Stream:
        """Check the request, give it a row and start it.

        Raises `BadRequest` for what cannot be honoured, `Overloaded` when every row is taken, `DeadlineMissed` when
        the deadline cannot be kept and the client wants to know at once, `Unavailable` while draining.
        """
        self._check_running()
        options = validated(options)
        ids = await self.tokenize(prompt, self.model.max_model_len)
        return await self._submit(np.array(ids, dtype=np.int32), options, id)

    async def _submit_known(self, canvas: KnownCanvas, options: Options, *, id: str | None = None) -> Stream:
        """Denoise in one step a canvas whose masked tokens are known: they are put back whatever the model prefers, and
        their confidences are the probabilities that it gave them.

        The answer begins with the first of the masked tokens; of `options` those count that say whose request it is and
        what it is worth. Raises as `submit` does.
        """
        self._check_running()
        return await self._submit(canvas.prompt, canvas.decoded(validated(options)), id, canvas.answer)

    async def _submit(
        self,
        prompt_ids: np.ndarray[Any, np.dtype[np.int32]],
        options: Options,
        id: str | None,
        answer: np.ndarray[Any, np.dtype[np.int32]] | None = None,
    ) -> Stream:
        limit, seed, length = self.model.max_model_len, self.config.decode.seed, len(prompt_ids)
        seed = secrets.randbits(63) if seed is None else seed
        resolved = resolve(options, length, limit, seed, self.config.decode, self.model.traits)
        given = len(options.resume_token_ids)
        before = await self.off_loop(given, lambda: resumed(options, resolved, length, self.text, self.vocabulary))
        hasher = prefix_hasher(resolved.decoding)
        final = np.concatenate([prompt_ids, before.final])
        hashes = await self.off_loop(len(final), lambda: hasher.extend(final)) if hasher else ()
        slo = wanted(options, self.classes)
        token_ids(options.stop_token_ids, self.vocab_size, "stop_token_ids")
        self._check_room(resolved)
        id = secrets.token_hex(12) if id is None else plain(converted(id, str, "id"))
        if id in self.streams:
            raise BadRequest(f"a request with the id {quoted(id)} is running; choose another id", param="id")
        stream = self._start(id, prompt_ids, hashes, hasher, resolved, slo, options, before, answer)
        if slo.on_miss == "reject":
            try:
                await stream.admitted()
            except asyncio.CancelledError:
                await stream.aclose()
                raise
        return stream

    def quote(self, prompt_tokens: int, options: Options | None = None) -> Quote:
        """What would become of a request now, with a prompt of so many tokens; nothing is changed by asking.

        K/V that other requests have left of its prompt are not counted. Raises as `submit` does for what cannot be
        honoured, and `Unavailable` while draining.
        """
        self._check_running()
        options, tokens = validated(options), converted(prompt_tokens, int, "prompt_tokens")
        resolved = resolve(options, max(0, tokens), self.model.max_model_len, 0, self.config.decode, self.model.traits)
        check_length(options, resolved)
        slo = wanted(options, self.classes)
        self._check_room(resolved)
        return self.consumer.quote(new_request(Place(), tokens, options, resolved, slo, self.loop.time()))

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
        return await self.tokenization.tokenize(prompt, limit)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises `BadRequest`."""
        return self.tokenization.detokenize(ids)

    def _check_running(self) -> None:
        """Raises `Unavailable` if the engine does not run in the caller's loop."""
        if self.main is None:
            raise Unavailable("the engine is not running; enter it with `async with` first")
        if asyncio.get_running_loop() is not self.loop:
            raise Unavailable("the engine lives in another event loop; call it from there, or use dilaserve.DilaServe")

    def _start(
        self,
        id: str,
        prompt: np.ndarray[Any, np.dtype[np.int32]],
        hashes: tuple[int, ...],
        hasher: PrefixHasher | None,
        resolved: ResolvedOptions,
        slo: Slo,
        options: Options,
        before: Resumed,
        answer: np.ndarray[Any, np.dtype[np.int32]] | None,
    ) -> Stream:
        """Give a checked request a row, fill it and post its arrival. Raises `Overloaded`."""
        row = self.consumer.take_row(slo)
        try:
            judged = answer is not None
            if answer is None:
                answer = before.canvas(resolved.canvas_tokens - len(prompt), self.mask_id)
            generation = self.table.fill(
                row, prompt, resolved.canvas_tokens, self.mask_id, resolved.decoding, ending(options), answer, judged
            )
            place, now = Place(id, row, generation), self.loop.time()
            request = new_request(place, len(prompt), options, resolved, slo, now, hashes, before.ended)
            stream = Stream(request, prompt, before, self.text, self.consumer.post, self.mask_id, hasher)
        except BaseException:
            self.consumer.free.append(row)
            raise
        self.streams[id] = stream
        self.idle.clear()
        self.consumer.post(Arrival(request))
        return stream

    def _check_room(self, resolved: ResolvedOptions) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down; try another", retry_after=5.0)
        if not self.consumer.pools:
            return
        check_pool(resolved, self.consumer.smallest_pool(min(self.degrees)))


def first(broken: BaseException) -> BaseException:
    """The error at the bottom of nested groups."""
    while isinstance(broken, BaseExceptionGroup):
        broken = broken.exceptions[0]
    return broken
