"""How child processes are started, and all ended at once, whoever's program this is: a script, a notebook, a worker of
a pool, or a fork of one of these. Knows nothing of what they do.

They are made by `subprocess`, or forked by a process that has imported what they need. `multiprocessing` would read the
working directory, which may be gone, run the main script again, refuse to work inside a daemonic process, and end its
children when a fork of this process exits.
"""

import atexit
import contextlib
import fcntl
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.spawn import get_executable
from typing import Any, NamedTuple, Protocol, TypeAlias

from dilaserve.system import fork_server
from dilaserve.system.fork_server import ForkedChild, OwnFork

log = logging.getLogger(__name__)
BOOT = (
    "import pickle, sys; read = sys.stdin.buffer; "
    "sys.path[:] = pickle.load(read); run, arguments = pickle.load(read); run(*arguments)"
)
PREFERRED = {"TORCH_BLAS_PREFER_CUBLASLT": "1"}  # on CUDA: 4 % of a reuse step of one row, as its products are small
COUNT_AT_IMPORT = ("PYTHON", "TORCH", "PYTORCH", "OMP", "MKL", "KMP", "OPENBLAS", "CUDA", "NVIDIA", "TRITON", "LD_")
PATIENCE = 10.0  # seconds that a killed process gets to end
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # who starts threads while it is imported


def here() -> str:
    """The working directory; the root where it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return "/"


HERE = here()  # to which relative entries of sys.path refer, wherever the program goes later


class Line(Protocol):
    """This side of what connects a child with its parent."""

    def close(self) -> None: ...


Child: TypeAlias = subprocess.Popen[bytes] | ForkedChild | OwnFork
running: dict[Child, Line] = {}  # the children of this very process, and the lines to them


def start(
    name: str,
    run: Callable[..., None],
    arguments: Sequence[Any],
    line: Line,
    inherited: Sequence[int],
    threads: int = 1,
) -> subprocess.Popen[bytes]:
    """Start a child that calls `run(*arguments)`, a function of a module; `name` is seen in the list of processes.

    It inherits the descriptors `inherited`, and SIGINT and SIGTERM as blocked, so that only its engine ends it. Forks
    of this process close their copy of `line`, so that its end tells the child that this very process is gone.
    Raises `OSError` where the system has no process for it.
    """
    command = [get_executable(), "-c", BOOT, name]
    environment = environment_of(threads)
    written = pickle.dumps(absolute_path()) + pickle.dumps((run, tuple(arguments)))
    with blocked(signal.SIGINT, signal.SIGTERM):
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=inherited, cwd="/", env=environment)
    running[child] = line
    try:
        with child.stdin as pipe:  # type: ignore[union-attr]
            pipe.write(written)
    except OSError:
        end(child)
        raise
    return child


class ForkServer(NamedTuple):
    """A fork server, the line to it, and what was in force when it began to import."""

    process: subprocess.Popen[bytes] | OwnFork
    control: socket.socket
    imported_with: tuple[object, ...]


class ForkServers:
    """The fork servers of this process: one, unless settings that count at import have changed meanwhile."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.servers: list[ForkServer] = []
        self.forks: dict[ForkedChild, ForkServer] = {}

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While anybody is inside, workers are forked; then the servers end."""
        with self.lock:
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.end(self.servers)

    def fork(
        self,
        name: str,
        run: Callable[..., None],
        arguments: Sequence[Any],
        inherited: Sequence[int],
        environment: Mapping[str, str],
    ) -> ForkedChild:
        """Have a child forked; by another server where the present one has died just now."""
        server = self.current([run.__module__])
        wanted = name, run, arguments, inherited, environment, absolute_path()
        try:
            child = fork_server.ask(server.control, *wanted)
        except (BrokenPipeError, ConnectionResetError):
            self.end([server])
            server = self.current([run.__module__])
            child = fork_server.ask(server.control, *wanted)
        self.forks[child] = server
        return child

    def divide(self, modules: Sequence[str]) -> None:
        """Have a fork of this process be the server, so that nothing is imported twice. For a program that has imported
        the modules and begun nothing else: of threads nothing is left in a fork but the locks that they held.
        """
        if threading.active_count() > 1:
            return
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, blocked(signal.SIGINT, signal.SIGTERM):
            process = fork_server.divide(theirs, modules)
        self.servers.append(ForkServer(process, mine, imported_now(modules)))
        running[process] = mine

    def current(self, modules: Sequence[str]) -> ForkServer:
        """The server that has imported these modules as they would be imported now."""
        wanted = imported_now(modules)
        for server in self.servers:
            if server.imported_with == wanted and server.process.poll() is None:
                return server
        busy = {self.forks[child].process.pid for child in list(running) if child in self.forks}
        self.end([server for server in self.servers if server.process.pid not in busy])
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with socket.socket(fileno=heritable(theirs.detach())) as end:
            arguments = end.fileno(), tuple(modules)
            process = start(fork_server.NAME, fork_server.serve, arguments, mine, [end.fileno()])
        self.servers.append(ForkServer(process, mine, wanted))
        return self.servers[-1]

    def end(self, servers: Sequence[ForkServer]) -> None:
        for server in servers:
            server.control.close()
            end(server.process)
        self.servers = [server for server in self.servers if server not in servers]
        self.forks = {child: server for child, server in self.forks.items() if server in self.servers}


fork_servers = ForkServers()


def fork(
    name: str,
    run: Callable[..., None],
    arguments: Sequence[Any],
    line: Line,
    inherited: Sequence[int],
    threads: int = 1,
) -> Child:
    """Like `start`, from a process that has imported the module of `run`; outside `fork_servers.used` just that.

    Where the system has no process for it, the child says so by `refused`.
    """
    if not fork_servers.users:
        return start(name, run, arguments, line, inherited, threads)
    with fork_servers.lock:
        child = fork_servers.fork(name, run, arguments, inherited, environment_of(threads))
    running[child] = line
    return child


def imported_now(modules: Sequence[str]) -> tuple[object, ...]:
    """What decides how these modules are imported."""
    counts = sorted(item for item in os.environ.items() if item[0].startswith(COUNT_AT_IMPORT))
    return *modules, get_executable(), *sys.path, *counts


def absolute_path() -> list[str]:
    """`sys.path` for a process that works in another directory."""
    return [os.path.join(HERE, entry) for entry in sys.path]


def environment_of(threads: int) -> dict[str, str]:
    return {**PREFERRED, **os.environ, **dict.fromkeys(POOLS, str(threads))}


def heritable(fd: int) -> int:
    """The descriptor, out of the way of the standard streams: a child has its own, and here they may be closed."""
    if fd > 2:
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def end(child: Child) -> None:
    """Kill the child; one that the kernel keeps for long is left to it."""
    child.kill()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        log.error("the process %d (%s) cannot be killed", child.pid, child.args[-1])  # type: ignore[index]
    forgotten(child)


def forgotten(child: Child) -> None:
    """The child is gone, or somebody else's."""
    running.pop(child, None)
    if isinstance(child, ForkedChild):
        fork_servers.forks.pop(child, None)


def kill() -> None:
    """End all children of this process, whatever they do."""
    for child in list(running):
        child.kill()


def forget() -> None:
    """This process is a fork of the one whose children they are."""
    global fork_servers
    for line in running.values():
        line.close()
    running.clear()
    fork_servers = ForkServers()


atexit.register(kill)  # an engine that is never left must not keep its workers
os.register_at_fork(after_in_child=forget)


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
