"""How child processes are started, and all ended at once, whoever's program this is: a script, a notebook, a worker of
a pool, or a fork of one of these. Knows nothing of what they do.

They are made by `subprocess`. `multiprocessing` would read the working directory, which may be gone, run the main
script again, refuse to work inside a daemonic process, and end its children when a fork of this process exits.
"""

import atexit
import contextlib
import fcntl
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.spawn import get_executable
from typing import Any, Protocol

log = logging.getLogger(__name__)
BOOT = (
    "import pickle, sys; read = sys.stdin.buffer; "
    "sys.path[:] = pickle.load(read); run, arguments = pickle.load(read); run(*arguments)"
)
PREFERRED = {"TORCH_BLAS_PREFER_CUBLASLT": "1"}  # on CUDA: 4 % of a reuse step of one row, as its products are small
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


running: dict[subprocess.Popen[bytes], Line] = {}  # the children of this very process, and the lines to them


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
    environment = {**PREFERRED, **os.environ, **dict.fromkeys(POOLS, str(threads))}
    written = pickle.dumps([os.path.join(HERE, entry) for entry in sys.path]) + pickle.dumps((run, tuple(arguments)))
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


def heritable(fd: int) -> int:
    """The descriptor, out of the way of the standard streams: a child has its own, and here they may be closed."""
    if fd > 2:
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child; one that the kernel keeps for long is left to it."""
    child.kill()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        log.error("the process %d (%s) cannot be killed", child.pid, child.args[-1])  # type: ignore[index]
    running.pop(child, None)


def kill() -> None:
    """End all children of this process, whatever they do."""
    for child in list(running):
        child.kill()


def forget() -> None:
    """This process is a fork of the one whose children they are."""
    for line in running.values():
        line.close()
    running.clear()


atexit.register(kill)  # an engine that is never left must not keep its workers
os.register_at_fork(after_in_child=forget)


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
