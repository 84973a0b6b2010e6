"""One worker process per device: instances formed of them, batches sent to them, and what is done when one dies."""

import asyncio
import itertools
import logging
import os

import msgspec

from dilaserve.errors import CheckpointError, ConfigError, DilaserveError
from dilaserve.executor.executor import Post, Progress
from dilaserve.executor.rendezvous import rendezvous
from dilaserve.executor.worker_handle import Ended, WorkerExit, WorkerHandle
from dilaserve.system import backoff, child_processes
from dilaserve.transport import frames
from dilaserve.types import (
    Batch,
    Instance,
    InstanceLost,
    InstanceReady,
    Moves,
    StepDone,
    WorkerLost,
    WorkerUp,
)
from dilaserve.worker.main import Shared, WorkerJob

log = logging.getLogger(__name__)
RESPAWN_PAUSE = 0.5  # seconds before a worker that did not come up is started again; doubles with each attempt
MOST_PAUSE = 10.0  # seconds; it doubles no further
MAX_FAILURES = 3  # to load, in a row, after which nothing is expected of a rank


class Forming(msgspec.Struct):
    """An instance, and its ranks that have not joined it yet; once it is lost, why, and those that have not left it."""

    instance: Instance
    missing: set[int]
    end: "WorkerExit | None" = None
    not_left: set[int] = set()


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
        with rendezvous(self.jobs) as place, child_processes.fork_servers.used():
            async with asyncio.TaskGroup() as group:
                for rank, job in enumerate(self.jobs):
                    job = msgspec.structs.replace(job, store=f"{place}/store")
                    group.create_task(self.keep_running(rank, job, ready[rank]))
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
        then = [list(spans) for spans in batch.then]
        order = frames.RunBatch(batch.id, list(batch.spans), batch.steps, then, list(batch.copies))
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
            for rank in tuple(known.not_left) or self.shared.exchange.behind(known.instance.ranks):
                if rank in self.workers:
                    self.workers[rank].kill(reason)

    async def keep_running(self, rank: int, job: WorkerJob, ready: asyncio.Future[None]) -> None:
        """Keep one worker alive: start it, and start it again when it is gone.

        Raises `DilaserveError` when so many ranks fail to load again and again that no instance is left.
        """
        tries = 0  # since it was of use, or somebody else ended it
        for life in itertools.count(1):
            end = await self.run_once(rank, job, life, ready)
            if not ready.done() and end.ended is not Ended.KILLED:
                ready.set_exception(refusal(end))
                return
            well = end.ended is Ended.LOST and (end.outside or rank in self.useful)
            tries = 0 if well else tries + 1
            self.count(rank, job, end)
            pause = backoff.pause(tries, RESPAWN_PAUSE, MOST_PAUSE)
            log.warning("worker %d on %s is gone (%s); starting another in %g s", rank, job.device, end.reason, pause)
            await asyncio.sleep(pause)

    def count(self, rank: int, job: WorkerJob, end: WorkerExit) -> None:
        """Remember how often the rank has failed to load; being killed, or not started, tells nothing of that."""
        if end.ended in (Ended.FAILED, Ended.LOST):
            self.failures[rank] = self.failures[rank] + 1 if end.ended is Ended.FAILED else 0
        if sum(count < MAX_FAILURES for count in self.failures) < job.shards:
            raise DilaserveError(f"the worker on {job.device} does not come back: {end.reason}")

    async def run_once(self, rank: int, job: WorkerJob, life: int, ready: asyncio.Future[None]) -> WorkerExit:
        """One worker process, from its start to its end."""
        try:
            handle = WorkerHandle(job, rank, life, self.shared)
        except Exception as error:  # whatever the system has not got for a process now, it may have later
            return WorkerExit(Ended.NOT_STARTED, f"no process could be started: {error or type(error).__name__}")
        async with handle:
            try:
                return await self.read_reports(rank, handle, ready)
            except asyncio.CancelledError:
                self.abandon(rank)  # its peers must not wait for one that leaves
                raise

    async def read_reports(self, rank: int, handle: "WorkerHandle", ready: asyncio.Future[None]) -> WorkerExit:
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
        end = await handle.exit(broken)
        if self.workers.pop(rank, None):
            self.post(WorkerLost(rank, end.reason))
            for instance in self.abandon(rank):
                self.lost(instance, end)
                self.left(rank, instance)
        return end

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
        if known and rank in known.missing and known.end is None:
            known.missing.remove(rank)
            if not known.missing:
                self.post(InstanceReady(known.instance))

    def lost(self, instance: int, end: WorkerExit) -> None:
        """A rank of the instance is gone, perhaps not the first: ask the others to leave it."""
        known = self.instances[instance]
        if known.end is None:
            known.end = end
            known.not_left = {rank for rank in known.instance.ranks if rank in self.workers}
            for rank in known.not_left:
                self.workers[rank].send(frames.Leave(instance))

    def left(self, rank: int, instance: int) -> None:
        """A rank has left a lost instance, or is gone. Once all have, none of them writes to its rows any more."""
        known = self.instances.get(instance)
        if known and known.end:
            known.not_left.discard(rank)
            if not known.not_left:
                del self.instances[instance]
                self.post(InstanceLost(instance, known.end.reason, known.end.outside))

    def abandon(self, rank: int) -> list[int]:
        """Let the peers of a lost worker leave what they do together; returns the instances that are lost."""
        if os.getpid() != self.owner:
            return []  # a fork of the engine's process ends, and no worker with it
        lost = [id for id, known in self.instances.items() if rank in known.instance.ranks]
        for id in lost:
            for peer in self.instances[id].instance.ranks:
                self.shared.exchange.abandon(peer, id)
        return lost


def refusal(end: WorkerExit) -> ConfigError:
    """Why an engine does not start."""
    if end.ended is Ended.NOT_STARTED:
        return ConfigError(f"{end.reason}; see what limits the processes, open files and memory of this user")
    return CheckpointError(end.reason)
