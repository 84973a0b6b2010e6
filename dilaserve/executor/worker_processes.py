"""The reach of the engine: worker processes, the lines to them, and what is done when one dies."""

import asyncio
import atexit
import contextlib
import enum
import itertools
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

import msgspec

from dilaserve.errors import CheckpointError, ConfigError, DilaserveError
from dilaserve.system import backoff, child_processes, host
from dilaserve.transport import frames
from dilaserve.types import (
    Batch,
    Event,
    Instance,
    InstanceLost,
    InstanceReady,
    Moves,
    StepDone,
    WorkerLost,
    WorkerUp,
)
from dilaserve.worker import main as worker
from dilaserve.worker.main import Shared, WorkerJob

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # device, bytes placed, bytes in all
Post = Callable[[Event], None]
PATIENCE = 5.0  # seconds a worker gets to leave before it is killed
MORTAL = 1.0  # seconds after its kill in which a process ends, unless the kernel keeps it; it runs none of its code
LOOK = 0.01  # seconds between two looks whether a process has left
RESPAWN_PAUSE = 0.5  # seconds before a worker that did not come up is started again; doubles with each attempt
MOST_PAUSE = 10.0  # seconds; it doubles no further
MAX_FAILURES = 3  # to load, in a row, after which nothing is expected of a rank
GIB = 2**30
CRASHES = {  # signals that a process brings upon itself
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
}


class Executor(Protocol):
    """Whatever can run batches: worker processes, or a machine that only spends the time."""

    async def run(self, post: Post, started: asyncio.Future[None]) -> None:
        """Serve until cancelled; every event goes to `post`.

        `started` is resolved when instances may be formed, or gets the `CheckpointError` that prevents it.
        """

    def launch(self, batch: Batch) -> None:
        """Begin a step; its `StepDone` comes by `post`."""

    def stop_early(self, batch: Batch) -> None:
        """Let a batch of several steps end with the one that is under way; it may have ended by itself."""

    def reshard(self, moves: Moves) -> None:
        """End instances and form others; an `InstanceReady` comes for each of these."""

    def kill(self, instance: int, reason: str) -> None:
        """The instance hangs; its `InstanceLost` comes by `post`."""


class Forming(msgspec.Struct):
    """An instance, and its ranks that have not joined it yet; once it is lost, why, and those that have not left it."""

    instance: Instance
    missing: set[int]
    death: "Death | None" = None
    staying: set[int] = set()


class Ended(enum.Enum):
    """When and by whom the life of a worker process came to its end."""

    UNBORN = "the system had no process for it"
    KILLED = "somebody else killed it before it was up"
    FAILED = "it could not load, or crashed over it"
    LOST = "it was up"


class Death(NamedTuple):
    """The end of a worker. `outside`: somebody else killed it, so that nothing it did can be the reason."""

    ended: Ended
    reason: str
    outside: bool = False


class ProcessExecutor:
    """One worker process per job; the job's place in the list is its rank.

    A worker stays whatever instance it belongs to; when it dies its whole instance is lost, and the other members leave
    whatever they do together and are there for the next one.
    """

    def __init__(self, jobs: list[WorkerJob], shared: Shared, progress: Progress) -> None:
        self.jobs, self.shared, self.progress = jobs, shared, progress
        self.workers: dict[int, WorkerHandle] = {}
        self.instances: dict[int, Forming] = {}
        self.failures = [0] * len(jobs)  # to load, in a row, by rank
        self.useful: set[int] = set()  # ranks whose process has finished a step
        self.owner = os.getpid()

    async def run(self, post: Post, started: asyncio.Future[None]) -> None:
        self.post = post
        ready = [asyncio.get_running_loop().create_future() for _ in self.jobs]
        with meeting_place(self.jobs) as place:
            async with asyncio.TaskGroup() as group:
                for rank, job in enumerate(self.jobs):
                    job = msgspec.structs.replace(job, store=f"{place}/store")
                    group.create_task(self.mind(rank, job, ready[rank]))
                try:
                    await asyncio.gather(*ready)
                    log.info("memory: %s", "; ".join(self.taken()))
                    for rank, handle in sorted(self.workers.items()):
                        post(WorkerUp(rank, handle.ready.kv_tokens))
                    started.set_result(None)
                except ConfigError as error:
                    started.set_exception(error)

    def taken(self) -> list[str]:
        """What there was for CPU workers, and what each worker has taken of its device."""
        origins = list(dict.fromkeys(job.claim.origin for job in self.jobs if job.claim.origin))
        return origins + [handle.taken() for _, handle in sorted(self.workers.items())]

    def launch(self, batch: Batch) -> None:
        order = frames.RunBatch(batch.id, list(batch.spans), batch.steps, [list(spans) for spans in batch.then])
        for rank in self.instances[batch.instance].instance.ranks:
            self.workers[rank].send(order)

    def stop_early(self, batch: Batch) -> None:
        if known := self.instances.get(batch.instance):
            for rank in known.instance.ranks:
                self.shared.exchange.stop_early(rank, batch.id)

    def reshard(self, moves: Moves) -> None:
        for id in moves.ends:
            self.instances.pop(id, None)
        for instance in moves.begins:
            self.instances[instance.id] = Forming(instance, set(instance.ranks))
            lives = [self.workers[rank].life for rank in instance.ranks]
            for rank in instance.ranks:
                self.workers[rank].send(frames.JoinInstance(instance.id, list(instance.ranks), lives))

    def kill(self, instance: int, reason: str) -> None:
        """End the ranks that the others wait for; of an instance that is lost, those that do not leave it."""
        if known := self.instances.get(instance):
            for rank in tuple(known.staying) or self.shared.exchange.behind(known.instance.ranks):
                if rank in self.workers:
                    self.workers[rank].kill(reason)

    async def mind(self, rank: int, job: WorkerJob, ready: asyncio.Future[None]) -> None:
        """Keep one worker alive: start it, hear it out, and start it again when it is gone.

        Raises `DilaserveError` when so many ranks fail to load again and again that no instance is left.
        """
        tries = 0  # since it was of use, or somebody else ended it
        for life in itertools.count(1):
            death = await self.live(rank, job, life, ready)
            if not ready.done() and death.ended is not Ended.KILLED:
                ready.set_exception(refusal(death))
                return
            well = death.ended is Ended.LOST and (death.outside or rank in self.useful)
            tries = 0 if well else tries + 1
            self.count(rank, job, death)
            pause = backoff.pause(tries, RESPAWN_PAUSE, MOST_PAUSE)
            log.warning("worker %d on %s is gone (%s); starting another in %g s", rank, job.device, death.reason, pause)
            await asyncio.sleep(pause)

    def count(self, rank: int, job: WorkerJob, death: Death) -> None:
        """Remember how often the rank has failed to load; being killed, or not started, tells nothing of that."""
        if death.ended in (Ended.FAILED, Ended.LOST):
            self.failures[rank] = self.failures[rank] + 1 if death.ended is Ended.FAILED else 0
        if sum(count < MAX_FAILURES for count in self.failures) < job.shards:
            raise DilaserveError(f"the worker on {job.device} does not come back: {death.reason}")

    async def live(self, rank: int, job: WorkerJob, life: int, ready: asyncio.Future[None]) -> Death:
        """One worker process, from its start to its end."""
        try:
            handle = WorkerHandle(job, rank, life, self.shared)
        except Exception as error:  # whatever the system has not got for a process now, it may have later
            return Death(Ended.UNBORN, f"no process could be started: {error or type(error).__name__}")
        async with handle:
            try:
                return await self.hear(rank, handle, ready)
            except asyncio.CancelledError:
                self.abandon(rank)  # its peers must not wait for one that leaves
                raise

    async def hear(self, rank: int, handle: "WorkerHandle", ready: asyncio.Future[None]) -> Death:
        """Pass on a worker's reports until it is gone; returns how that came about."""
        broken = ""
        while (report := await handle.report()) is not None:
            match report:
                case frames.Loading(done, total):
                    self.progress(handle.job.device, done, total)
                case frames.Ready():
                    handle.ready = report
                    self.attach(rank, handle)
                    if ready.done():
                        self.post(WorkerUp(rank, report.kv_tokens))
                    else:
                        ready.set_result(None)
                case frames.Formed(instance):
                    self.formed(rank, instance)
                case frames.Left(instance):
                    self.left(rank, instance)
                case frames.Broken(message):
                    broken = message
        self.abandon(rank)
        death = await handle.death(broken)
        if self.workers.pop(rank, None):
            self.post(WorkerLost(rank, death.reason))
            for instance in self.abandon(rank):
                self.lost(instance, death)
                self.left(rank, instance)
        return death

    def attach(self, rank: int, handle: "WorkerHandle") -> None:
        """From now on steps go to this worker, and its reports are read straight from the loop, without a task."""
        self.workers[rank] = handle
        self.useful.discard(rank)
        handle.on_done(lambda done: self.step_done(rank, done))

    def step_done(self, rank: int, done: frames.Done) -> None:
        for id, known in self.instances.items():
            if rank in known.instance.ranks:
                self.useful.update(known.instance.ranks)
                self.post(StepDone(id, done.batch, tuple(done.results), done.seconds, done.forward, done.last))

    def formed(self, rank: int, instance: int) -> None:
        known = self.instances.get(instance)
        if known and rank in known.missing and known.death is None:
            known.missing.remove(rank)
            if not known.missing:
                self.post(InstanceReady(known.instance))

    def lost(self, instance: int, death: Death) -> None:
        """A rank of the instance is gone, perhaps not the first: ask the others to leave it."""
        known = self.instances[instance]
        if known.death is None:
            known.death = death
            known.staying = {rank for rank in known.instance.ranks if rank in self.workers}
            for rank in known.staying:
                self.workers[rank].send(frames.Leave(instance))

    def left(self, rank: int, instance: int) -> None:
        """A rank has left a lost instance, or is gone. Once all have, none of them writes to its rows any more."""
        known = self.instances.get(instance)
        if known and known.death:
            known.staying.discard(rank)
            if not known.staying:
                del self.instances[instance]
                self.post(InstanceLost(instance, known.death.reason, known.death.outside))

    def abandon(self, rank: int) -> list[int]:
        """Let the peers of a lost worker leave what they do together; returns the instances that are lost."""
        if os.getpid() != self.owner:
            return []  # a fork of the engine's process ends, and no worker with it
        lost = [id for id, known in self.instances.items() if rank in known.instance.ranks]
        for id in lost:
            for peer in self.instances[id].instance.ranks:
                self.shared.exchange.abandon(peer, id)
        return lost


def refusal(death: Death) -> ConfigError:
    """Why an engine does not start."""
    if death.ended is Ended.UNBORN:
        return ConfigError(f"{death.reason}; see what limits the processes, open files and memory of this user")
    return CheckpointError(death.reason)


@contextlib.contextmanager
def meeting_place(jobs: list[WorkerJob]) -> Iterator[str]:
    """A directory for files through which torch.distributed introduces workers; none is made where it is not needed."""
    if all(job.backend == "shm" for job in jobs):
        yield ""
        return
    owner = os.getpid()
    try:
        place = tempfile.mkdtemp(prefix=f"dilaserve-{owner}-")
    except OSError as error:
        raise ConfigError(f"workers have no directory to meet in: {error}; set TMPDIR to one") from error
    atexit.register(remove, place, owner)
    try:
        yield place
    finally:
        remove(place, owner)


def remove(place: str, owner: int) -> None:
    """By the process that has made it, not by forks of it."""
    if os.getpid() == owner:
        shutil.rmtree(place, ignore_errors=True)


class WorkerHandle:
    """One child process and this side of its line; it is gone when the block is left.

    Raises whatever keeps the system from starting a process.
    """

    def __init__(self, job: WorkerJob, rank: int, life: int, shared: Shared) -> None:
        self.job, self.life = job, life
        self.ready = frames.Ready(0, 0, 0)
        self.verdict = ""  # why it was killed from here
        self.heard = False  # it has said its last
        self.loop = asyncio.get_running_loop()
        self.others: asyncio.Queue[frames.Report | None] = asyncio.Queue()
        self.done: Callable[[frames.Done], None] = lambda done: None
        self.out_of_memory_kills = host.out_of_memory_kills()
        self.line, theirs = frames.pair()
        self.line.setblocking(False)
        with theirs:
            try:
                self.loop.add_reader(self.line, self.readable)
                arguments, inherited = (job, rank, shared, theirs.fileno()), [theirs.fileno(), *shared.descriptors]
                name = f"dilaserve worker on {job.device}"
                self.process = child_processes.start(name, worker.main, arguments, self.line, inherited, job.threads)
            except BaseException:
                self.loop.remove_reader(self.line)
                self.line.close()
                raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.shield(asyncio.ensure_future(self.dismiss()))

    def on_done(self, done: Callable[[frames.Done], None]) -> None:
        self.done = done

    def send(self, order: frames.Order) -> None:
        try:
            frames.send(self.line, order)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the end of the line tells the same, in order
        except OSError as error:
            self.kill(f"an order could not be sent to it: {error.strerror}")

    def kill(self, verdict: str) -> None:
        """It counts as gone from now on, whether the kernel ends it or not."""
        self.verdict = verdict
        self.process.kill()
        self.end_reports()

    def end_reports(self) -> None:
        self.loop.remove_reader(self.line)
        if not self.heard:
            self.heard = True
            self.others.put_nowait(None)

    def readable(self) -> None:
        try:
            report = frames.receive_report(self.line)
        except BlockingIOError:
            return
        except OSError as error:
            report = None
            if not isinstance(error, ConnectionResetError):
                self.kill(f"its reports could not be read: {error.strerror}")
        if isinstance(report, frames.Done):
            self.done(report)
            return
        if report is None:
            self.end_reports()
        else:
            self.others.put_nowait(report)

    async def report(self) -> frames.Report | None:
        """The next report that is not `Done`; None when the worker is gone."""
        return await self.others.get()

    def taken(self) -> str:
        """What the worker has taken of its device, in words."""
        weights, pool = self.ready.weights / GIB, self.ready.pool / GIB
        return f"{self.job.device} {weights:.2f} GiB of weights, {pool:.2f} GiB of K/V ({self.ready.kv_tokens} tokens)"

    async def death(self, broken: str) -> Death:
        """How a worker ended whose line is closed, or that was killed; `broken` is what it has said of that."""
        left = await self.left(MORTAL if self.verdict else PATIENCE)
        code = self.process.returncode if left else None
        starved = code == -signal.SIGKILL and host.out_of_memory_kills() > self.out_of_memory_kills
        outside = code is not None and code < 0 and -code not in CRASHES and not (broken or self.verdict or starved)
        reason = broken or self.verdict or epitaph(code, starved)
        if self.ready.kv_tokens:
            return Death(Ended.LOST, reason, outside)
        reason = broken or f"the worker on {self.job.device} ended early: {reason}"
        return Death(Ended.KILLED if outside else Ended.FAILED, reason, outside)

    async def left(self, patience: float) -> bool:
        """Whether the process has ended, waiting so many seconds for it; without a thread, which may not be had."""
        until = self.loop.time() + patience
        while (code := self.process.poll()) is None and self.loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK)
        return code is not None

    async def dismiss(self) -> None:
        """Ask the child to leave, wait, then make it."""
        if self.process not in child_processes.running:
            return  # this is a fork of the process whose child it is
        self.loop.remove_reader(self.line)
        self.send(frames.Stop())
        self.line.close()
        if not await self.left(PATIENCE):
            self.process.kill()
            if not await self.left(PATIENCE):
                log.error("the process %d of the worker on %s cannot be killed", self.process.pid, self.job.device)
        child_processes.running.pop(self.process, None)


def epitaph(code: int | None, starved: bool) -> str:
    """Why a process is gone, by its exit code."""
    if code is None:
        return "it closed its line but still runs"
    if starved:
        return "killed by the kernel, as memory ran out; lower --kv-cache-tokens or --max-num-batched-tokens"
    return f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of those for real time, of which only the first and the last have names
        return f"signal {number}"
