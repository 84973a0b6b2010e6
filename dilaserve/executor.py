"""The reach of the engine: worker processes, the lines to them, and what is done when one dies."""

import asyncio
import atexit
import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import msgspec
import torch.multiprocessing as mp

from dilaserve import children, wire
from dilaserve.errors import CheckpointError, DilaserveError
from dilaserve.terms import (
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
from dilaserve.worker import loop as worker
from dilaserve.worker.loop import Job, Shared

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # device, bytes placed, bytes in all
Post = Callable[[Event], None]
PATIENCE = 5.0  # seconds a worker gets to leave before it is killed
RESPAWN_PAUSE = 2.0  # seconds, times the attempts that failed, before a worker is started again
MAX_FAILURES = 3  # attempts in a row, after which an engine without workers gives up


class Executor(Protocol):
    """Whatever can run batches: worker processes, or a machine that only spends the time."""

    async def run(self, post: Post, started: asyncio.Future[None]) -> None:
        """Serve until cancelled; every event goes to `post`.

        `started` is resolved when instances may be formed, or gets the `CheckpointError` that prevents it.
        """

    def launch(self, batch: Batch) -> None:
        """Begin a step; its `StepDone` comes by `post`."""

    def hurry(self, batch: Batch) -> None:
        """Let a batch of several steps end with the one that is under way; it may have ended by itself."""

    def reshard(self, moves: Moves) -> None:
        """End instances and form others; an `InstanceReady` comes for each of these."""

    def kill(self, instance: int, reason: str) -> None:
        """The instance hangs; its `InstanceLost` comes by `post`."""


class Forming(msgspec.Struct):
    """An instance, and its ranks that have not joined it yet."""

    instance: Instance
    missing: set[int]


class ProcessExecutor:
    """One worker process per job; the job's place in the list is its rank.

    A worker stays whatever instance it belongs to; when it dies its whole instance is lost, and the other members leave
    whatever they do together and are there for the next one.
    """

    def __init__(self, jobs: list[Job], shared: Shared, progress: Progress) -> None:
        self.jobs, self.shared, self.progress = jobs, shared, progress
        self.workers: dict[int, WorkerHandle] = {}
        self.instances: dict[int, Forming] = {}

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
                    for rank, handle in sorted(self.workers.items()):
                        post(WorkerUp(rank, handle.kv_tokens))
                    started.set_result(None)
                except CheckpointError as error:
                    started.set_exception(error)

    def launch(self, batch: Batch) -> None:
        order = wire.Run(batch.id, list(batch.spans), batch.steps, [list(spans) for spans in batch.then])
        for rank in self.instances[batch.instance].instance.ranks:
            self.workers[rank].send(order)

    def hurry(self, batch: Batch) -> None:
        if known := self.instances.get(batch.instance):
            for rank in known.instance.ranks:
                self.shared.exchange.hurry(rank, batch.id)

    def reshard(self, moves: Moves) -> None:
        for id in moves.ends:
            self.instances.pop(id, None)
        for instance in moves.begins:
            self.instances[instance.id] = Forming(instance, set(instance.ranks))
            lives = [self.workers[rank].life for rank in instance.ranks]
            for rank in instance.ranks:
                self.workers[rank].send(wire.Form(instance.id, list(instance.ranks), lives))

    def kill(self, instance: int, reason: str) -> None:
        """End the ranks that the others wait for."""
        if known := self.instances.get(instance):
            for rank in self.shared.exchange.behind(known.instance.ranks):
                self.workers[rank].kill(reason)

    async def mind(self, rank: int, job: Job, ready: asyncio.Future[None]) -> None:
        """Keep one worker alive: start it, hear it out, and start it again when it is gone.

        Raises `DilaserveError` when it fails to come back again and again and the others cannot do without it.
        """
        failures = life = 0
        while True:
            life += 1
            async with WorkerHandle.spawned(job, rank, life, self.shared) as handle:
                try:
                    reason = await self.hear(rank, handle, ready)
                except asyncio.CancelledError:
                    self.abandon(rank)  # its peers must not wait for one that leaves
                    raise
            if not ready.done():
                ready.set_exception(CheckpointError(reason))
                return
            failures = failures + 1 if handle.failed_to_load else 0
            if failures >= MAX_FAILURES and len(self.workers) < job.shards:
                raise DilaserveError(f"the worker on {job.device} does not come back: {reason}")
            log.warning("worker %d on %s is gone (%s); starting another", rank, job.device, reason)
            await asyncio.sleep(RESPAWN_PAUSE * failures)

    async def hear(self, rank: int, handle: "WorkerHandle", ready: asyncio.Future[None]) -> str:
        """Pass on a worker's reports until it is gone; returns why."""
        broken = ""
        while (report := await handle.report()) is not None:
            match report:
                case wire.Loading(done, total):
                    self.progress(handle.job.device, done, total)
                case wire.Ready(kv_tokens):
                    handle.failed_to_load, handle.kv_tokens = False, kv_tokens
                    self.attach(rank, handle)
                    if ready.done():
                        self.post(WorkerUp(rank, kv_tokens))
                    else:
                        ready.set_result(None)
                case wire.Formed(instance):
                    self.formed(rank, instance)
                case wire.Broken(message):
                    broken = message
        self.abandon(rank)
        reason = broken or handle.verdict or await handle.epitaph()
        if self.workers.pop(rank, None):
            self.post(WorkerLost(rank, reason))
            for instance in self.abandon(rank):
                del self.instances[instance]
                self.post(InstanceLost(instance, reason))
            return reason
        return broken or f"the worker on {handle.job.device} ended early: {reason}"

    def attach(self, rank: int, handle: "WorkerHandle") -> None:
        """From now on steps go to this worker, and its reports are read straight from the loop, without a task."""
        self.workers[rank] = handle
        handle.on_done(lambda done: self.step_done(rank, done))

    def step_done(self, rank: int, done: wire.Done) -> None:
        for id, known in self.instances.items():
            if rank in known.instance.ranks:
                self.post(StepDone(id, done.batch, tuple(done.results), done.seconds, done.forward, done.last))

    def formed(self, rank: int, instance: int) -> None:
        known = self.instances.get(instance)
        if known and rank in known.missing:
            known.missing.remove(rank)
            if not known.missing:
                self.post(InstanceReady(known.instance))

    def abandon(self, rank: int) -> list[int]:
        """Let the peers of a lost worker leave what they do together; returns the instances that are lost."""
        lost = [id for id, known in self.instances.items() if rank in known.instance.ranks]
        for id in lost:
            for peer in self.instances[id].instance.ranks:
                self.shared.exchange.abandon(peer, id)
        return lost


def meeting_place(jobs: list[Job]) -> contextlib.AbstractContextManager[str]:
    """A directory for files through which torch.distributed introduces workers; none is made where it is not needed."""
    if all(job.backend == "shm" for job in jobs):
        return contextlib.nullcontext("")
    return tempfile.TemporaryDirectory(prefix=f"dilaserve-{os.getpid()}-")


class WorkerHandle:
    """One child process and this side of its line."""

    def __init__(self, job: Job, life: int, process: Any, line: socket.socket) -> None:
        self.job, self.life, self.process, self.line = job, life, process, line
        self.failed_to_load, self.kv_tokens = True, 0
        self.verdict = ""  # why it was killed from here
        self.loop = asyncio.get_running_loop()
        self.others: asyncio.Queue[wire.Report | None] = asyncio.Queue()
        self.done: Callable[[wire.Done], None] = lambda done: None
        line.setblocking(False)
        self.loop.add_reader(line, self.readable)

    @classmethod
    @contextlib.asynccontextmanager
    async def spawned(cls, job: Job, rank: int, life: int, shared: Shared) -> AsyncIterator["WorkerHandle"]:
        """A running child, which is gone when the block is left."""
        ours, theirs = wire.pair()
        process = await asyncio.to_thread(spawn, job, rank, shared, theirs)
        theirs.close()
        handle = cls(job, life, process, ours)
        atexit.register(process.kill)  # an engine that is never left must not keep the interpreter waiting for it
        try:
            yield handle
        finally:
            await asyncio.shield(asyncio.ensure_future(handle.dismiss()))

    def on_done(self, done: Callable[[wire.Done], None]) -> None:
        self.done = done

    def send(self, order: wire.Order) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the end of the line tells the same, in order
            wire.send(self.line, order)

    def kill(self, verdict: str) -> None:
        self.verdict = verdict
        self.process.kill()

    def readable(self) -> None:
        try:
            report = wire.receive_report(self.line)
        except BlockingIOError:
            return
        except ConnectionResetError:
            report = None
        if isinstance(report, wire.Done):
            self.done(report)
            return
        if report is None:
            self.loop.remove_reader(self.line)
        self.others.put_nowait(report)

    async def report(self) -> wire.Report | None:
        """The next report that is not `Done`; None when the worker is gone."""
        return await self.others.get()

    async def epitaph(self) -> str:
        await asyncio.to_thread(self.process.join, PATIENCE)
        code = self.process.exitcode
        if code is None:
            return "it closed its line but still runs"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def dismiss(self) -> None:
        """Ask the child to leave, wait, then make it."""
        self.loop.remove_reader(self.line)
        self.send(wire.Stop())
        self.line.close()
        await asyncio.to_thread(self.process.join, PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            await asyncio.to_thread(self.process.join)
        atexit.unregister(self.process.kill)
        self.process.close()


def spawn(job: Job, rank: int, shared: Shared, line: socket.socket) -> Any:
    """Start a worker process."""
    process = mp.get_context("spawn").Process(
        target=worker.main, args=(job, rank, shared, line), name=f"dilaserve {job.device}", daemon=True
    )
    children.start(process)
    return process
