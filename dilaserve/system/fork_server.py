"""A process that has imported what workers need, and forks one on request: it starts in milliseconds instead of the
seconds that `import torch` takes, and shares the memory of what was imported.

    engine                        fork server                     worker
      | request + descriptors ------> |                              |
      |                               | fork ----------------------> |
      | <-- pid, pidfd (status line)  |                              |
      | <-- exit status (status line) | <--------- its end --------- |

The server has one thread and touches no device. It ends when its engine's process does, and its workers with it.
"""

import ctypes
import fcntl
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from setproctitle import setproctitle

from dilaserve.system.descriptors import ensure_standard_streams, lead_nowhere

MOST_BYTES = 2**16  # of a request, in one message
MOST_DESCRIPTORS = 64
PR_SET_PDEATHSIG = 1
NAME = "dilaserve fork server"  # in the list of processes
STARTED, REFUSED, ENDED = range(3)  # what a status line says: pid, errno, exit status as of `Popen.returncode`
SAID = struct.Struct("=Bi")


class Request(NamedTuple):
    """What to run in a fork: `call` is a pickled function with its arguments, which may name descriptors; `numbers` are
    those under which the descriptors that came along are found there.
    """

    name: str
    call: bytes
    numbers: tuple[int, ...]
    environment: dict[str, str]
    path: list[str]
    affinity: set[int]


def serve(fd: int, modules: Sequence[str]) -> None:
    """Import the modules, then fork for whoever sends requests through `fd`, until that is closed."""
    ensure_standard_streams()
    control = socket.socket(fileno=fd)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all pages
    Server(control).run()


def divide(control: socket.socket, modules: Sequence[str]) -> "OwnFork":
    """Fork this process as a server for the other end of `control`."""
    pid = os.fork()
    if not pid:
        become(control, modules)
    return OwnFork(NAME, pid)


def become(control: socket.socket, modules: Sequence[str]) -> NoReturn:
    """The whole life of a server that is a fork of its engine's process."""
    code = 1
    try:
        setproctitle(NAME)
        os.chdir("/")
        lead_nowhere(0)
        fd = control.detach()
        place([fd], [fd])
        serve(fd, modules)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Server:
    """`children`: the status line of each fork and its pid, by its pidfd."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.children: dict[int, tuple[int, socket.socket]] = {}
        self.poll = select.poll()
        self.poll.register(control, select.POLLIN)

    def run(self) -> None:
        while True:
            for fd, _ in self.poll.poll():
                if fd != self.control.fileno():
                    self.reap(fd)
                elif not self.receive():
                    return

    def receive(self) -> bool:
        """Take a request; False if nobody will send another."""
        data, received, _, _ = socket.recv_fds(self.control, MOST_BYTES, MOST_DESCRIPTORS)
        if not data:
            return False
        status, *others = received
        with socket.socket(fileno=status) as line:
            if not abandoned(line):
                self.fork(data, line, others)
        for fd in others:
            os.close(fd)
        return True

    def fork(self, data: bytes, line: socket.socket, received: Sequence[int]) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            line.send(SAID.pack(REFUSED, error.errno or 0))
            return
        if not pid:
            live(data, received, server)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = pid, line.dup()
        self.poll.register(pidfd, select.POLLIN)
        try:
            socket.send_fds(line, [SAID.pack(STARTED, pid)], [pidfd])
        except OSError:  # given up meanwhile
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def reap(self, pidfd: int) -> None:
        """A fork has ended: say how."""
        pid, line = self.children.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with line:
            try:
                line.send(SAID.pack(ENDED, code))
            except OSError:
                return  # nobody wants to know


def abandoned(line: socket.socket) -> bool:
    """Whether the engine has closed its end."""
    try:
        return not line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def live(data: bytes, received: Sequence[int], server: int) -> NoReturn:
    """The whole life of a fork."""
    code = 1
    try:
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != server:
            os._exit(1)  # it was gone before that took effect
        request: Request = pickle.loads(data)
        setproctitle(request.name)
        place(received, request.numbers)
        sys.path[:] = request.path
        os.environ.clear()
        os.environ.update(request.environment)
        os.sched_setaffinity(0, request.affinity)
        run, arguments = pickle.loads(request.call)
        run(*arguments)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def place(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Put each received descriptor under its number, and close all others but the standard streams."""
    above = max((*received, *numbers, 2)) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in received]
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in moved:
            try:
                os.close(fd)
            except OSError:
                continue  # that of the directory itself
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number, inheritable=number <= 2)
        os.close(fd)


class OwnFork:
    """A fork of this very process, with the methods of `subprocess.Popen` that are used of one."""

    def __init__(self, name: str, pid: int) -> None:
        self.args = [name]
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self.pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises `subprocess.TimeoutExpired`."""
        if self.poll() is None:
            readable(self.pidfd, timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class ForkedChild:
    """A fork as its engine sees it, with the methods of `subprocess.Popen` that are used of one.

    `args` are those that a process of its own would have. The server answers once it has imported everything; until
    then `poll` says that the child runs, and what needs its pid waits.
    """

    def __init__(self, name: str, line: socket.socket) -> None:
        self.args = [name]
        self.line = line
        line.setblocking(False)
        self.pidfd: int | None = None
        self.returncode: int | None = None
        self.refused: OSError | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        while self.poll() is None and not self._pid:
            readable(self.line.fileno())
        return self._pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        while self.returncode is None:
            try:
                self._hear()
            except BlockingIOError:
                break
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises `subprocess.TimeoutExpired`."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not readable(self.line.fileno(), left):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it; one that has not been forked yet will not be."""
        if self.poll() is not None:
            return
        if self.pidfd is not None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        else:
            self._over(-signal.SIGKILL)

    def _hear(self) -> None:
        """Take in what the server says of it. Raises `BlockingIOError` where it says nothing."""
        try:
            data, fds, _, _ = socket.recv_fds(self.line, SAID.size, 1)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self._over(-signal.SIGKILL)  # the server is gone, and its forks with it
            return
        what, value = SAID.unpack(data)
        if what == STARTED:
            self._pid, (self.pidfd,) = value, fds
            os.set_inheritable(self.pidfd, False)
        elif what == REFUSED:
            self.refused = OSError(value, os.strerror(value))
            self._over(1)
        else:
            self._over(value)

    def _over(self, code: int) -> None:
        self.returncode = code
        self.line.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def ask(
    control: socket.socket,
    name: str,
    run: Callable[..., None],
    arguments: Sequence[Any],
    inherited: Sequence[int],
    environment: Mapping[str, str],
    path: list[str],
) -> ForkedChild:
    """Have a fork of the server run this, with that environment and `sys.path`. Raises `OSError` where the request
    cannot be sent.
    """
    streams = [fd for fd in (1, 2) if is_open(fd)]
    numbers = (*streams, *inherited)
    call = pickle.dumps((run, tuple(arguments)))
    request = Request(name, call, numbers, dict(environment), path, os.sched_getaffinity(0))
    data = pickle.dumps(request)
    if len(data) > MOST_BYTES:
        raise OSError(f"a request of {len(data)} bytes is too large for the fork server")
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            socket.send_fds(control, [data], [theirs.fileno(), *numbers])
        except BaseException:
            mine.close()
            raise
    return ForkedChild(name, mine)


def readable(fd: int, timeout: float | None = None) -> bool:
    """Wait until there is something to read; of any descriptor, where `select.select` knows the first 1024 only."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else 1000 * timeout))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
