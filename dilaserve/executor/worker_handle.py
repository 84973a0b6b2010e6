"""One worker process as the engine sees it: its start, the line to it, and how it ended."""

import asyncio
import enum
import logging
import signal
from collections.abc import Callable
from typing import NamedTuple, Self

from dilaserve.system import child_processes, host
from dilaserve.transport import frames
from dilaserve.worker import main as worker
from dilaserve.worker.main import Shared, WorkerJob

log = logging.getLogger(__name__)
LEAVE_TIMEOUT = 5.0  # seconds a worker gets to leave before it is killed
KILL_TIMEOUT = 1.0  # seconds in which a killed process ends, unless the kernel keeps it
POLL_INTERVAL = 0.01  # seconds between two looks whether a process has left
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


class Ended(enum.Enum):
    """When and by whom the life of a worker process came to its end."""

    NOT_STARTED = "the system had no process for it"
    KILLED = "somebody else killed it before it was up"
    FAILED = "it could not load, or crashed over it"
    LOST = "it was up"


class WorkerExit(NamedTuple):
    """The end of a worker. `outside`: somebody else killed it, so that nothing it did can be the reason."""

    ended: Ended
    reason: str
    outside: bool = False


class WorkerHandle:
    """One child process and this side of its line; it is gone when the block is left.

    Raises whatever keeps the system from starting a process.
    """

    def __init__(self, job: WorkerJob, rank: int, life: int, shared: Shared) -> None:
        self.job, self.life = job, life
        self.ready = frames.Ready(0, 0, 0)
        self.kill_reason = ""  # why it was killed from here
        self.reports_ended = False
        self.loop = asyncio.get_running_loop()
        self.reports: asyncio.Queue[frames.Report | None] = asyncio.Queue()
        self.done: Callable[[frames.Done], None] = lambda done: None
        self.out_of_memory_kills = host.out_of_memory_kills()
        self.line, theirs = frames.pair()
        self.line.setblocking(False)
        with theirs:
            try:
                self.loop.add_reader(self.line, self.readable)
                arguments, inherited = (job, rank, shared, theirs.fileno()), [theirs.fileno(), *shared.descriptors]
                name = f"dilaserve worker on {job.device}"
                self.process = child_processes.fork(name, worker.main, arguments, self.line, inherited, job.threads)
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

    def kill(self, reason: str) -> None:
        """It counts as gone from now on, whether the kernel ends it or not."""
        self.kill_reason = reason
        self.process.kill()
        self.end_reports()

    def end_reports(self) -> None:
        self.loop.remove_reader(self.line)
        if not self.reports_ended:
            self.reports_ended = True
            self.reports.put_nowait(None)

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
            self.reports.put_nowait(report)

    async def report(self) -> frames.Report | None:
        """The next report that is not `Done`; None when the worker is gone."""
        return await self.reports.get()

    def taken(self) -> str:
        """What the worker has taken of its device, in words."""
        weights, pool = self.ready.weights / GIB, self.ready.pool / GIB
        return f"{self.job.device} {weights:.2f} GiB of weights, {pool:.2f} GiB of K/V ({self.ready.kv_tokens} tokens)"

    async def exit(self, broken: str) -> WorkerExit:
        """How a worker ended whose line is closed, or that was killed; `broken` is what it has said of that."""
        left = await self.left(KILL_TIMEOUT if self.kill_reason else LEAVE_TIMEOUT)
        code = self.process.returncode if left else None
        out_of_memory = code == -signal.SIGKILL and host.out_of_memory_kills() > self.out_of_memory_kills
        if refused := getattr(self.process, "refused", None):
            return WorkerExit(Ended.NOT_STARTED, f"no process could be started: {refused}")
        explained = broken or self.kill_reason
        outside = code is not None and code < 0 and -code not in CRASHES and not (explained or out_of_memory)
        reason = explained or exit_reason(code, out_of_memory)
        if self.ready.kv_tokens:
            return WorkerExit(Ended.LOST, reason, outside)
        reason = broken or f"the worker on {self.job.device} ended early: {reason}"
        return WorkerExit(Ended.KILLED if outside else Ended.FAILED, reason, outside)

    async def left(self, within: float) -> bool:
        """Whether the process has ended, waiting so many seconds for it; without a thread, which may not be had."""
        until = self.loop.time() + within
        while (code := self.process.poll()) is None and self.loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL)
        return code is not None

    async def dismiss(self) -> None:
        """Ask the child to leave, wait, then make it."""
        if self.process not in child_processes.running:
            return  # this is a fork of the process whose child it is
        self.loop.remove_reader(self.line)
        self.send(frames.Stop())
        self.line.close()
        if not await self.left(LEAVE_TIMEOUT):
            self.process.kill()
            if not await self.left(LEAVE_TIMEOUT):
                log.error("the process %d of the worker on %s cannot be killed", self.process.pid, self.job.device)
        child_processes.forgotten(self.process)


def exit_reason(code: int | None, out_of_memory: bool) -> str:
    """Why a process is gone, by its exit code."""
    if code is None:
        return "it closed its line but still runs"
    if out_of_memory:
        return "killed by the kernel, as memory ran out; lower --kv-cache-tokens or --max-num-batched-tokens"
    return f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of those for real time, of which only the first and the last have names
        return f"signal {number}"
