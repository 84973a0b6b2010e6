"""Children that are forked from a process which has imported what they need."""

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import forked_python
import pytest

from dilaserve.system import child_processes, fork_server
from dilaserve.system.child_processes import fork_servers

HERE = str(Path(__file__).parent)


def leave(fd, how):
    """What the children run: say what there is, wait for a byte, then end in some way."""
    line = socket.socket(fileno=fd)
    there = sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and exists(fd))
    line.send(repr((os.environ.get("SAID"), there, os.getpid(), "torch" in sys.modules)).encode())
    line.recv(1)
    if how == "raise":
        raise ValueError("as asked")
    if isinstance(how, signal.Signals):
        os.kill(os.getpid(), how)
    sys.exit(how)


def exists(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Forked:
    """A child, with this side of the line to it and the number of the other."""

    def __init__(self, how=0):
        self.line, theirs = socket.socketpair()
        with socket.socket(fileno=child_processes.heritable(theirs.detach())) as end:
            self.number = end.fileno()
            arguments = self.number, how
            self.child = child_processes.fork("dilaserve test", leave, arguments, self.line, [self.number])

    def heard(self):
        """What it has said; also waits until it runs."""
        return eval(self.line.recv(1000).decode())

    def end(self):
        self.line.close()
        code = self.child.wait(20)
        child_processes.forgotten(self.child)
        return code


@pytest.fixture(autouse=True)
def findable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.mark.parametrize(
    ("how", "code"), [(0, 0), (3, 3), ("raise", 1), ("text", 1), (signal.SIGKILL, -9), (signal.SIGSEGV, -11)]
)
def test_the_end_of_a_child_is_told_as_by_popen(how, code):
    forked = Forked(how)
    assert forked.child.poll() is None
    forked.heard()
    assert forked.end() == forked.child.returncode == forked.child.poll() == code
    forked.child.kill()


def test_a_child_has_the_descriptors_and_the_environment_of_now_and_nothing_else(monkeypatch):
    before = Forked()
    before.heard()
    assert before.end() == 0
    monkeypatch.setenv("SAID", "now")
    first, second = Forked(), Forked()
    for forked in (first, second):
        said, descriptors, pid, _ = forked.heard()
        assert (said, descriptors, pid) == ("now", [forked.number], forked.child.pid)
        assert Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0") == "dilaserve test"
    assert (first.end(), second.end()) == (0, 0)


def test_children_of_one_kind_have_one_server_which_is_replaced_when_it_dies():
    first, second = Forked(), Forked()
    first.heard(), second.heard()
    (server,) = {fork_servers.forks[one.child].process for one in (first, second)}
    server.kill()
    assert (first.end(), second.end()) == (-9, -9)
    third = Forked()
    assert third.heard()[2] == third.child.pid
    assert third.end() == 0


def test_a_child_that_is_killed_before_there_is_a_server_is_never_forked():
    for server in list(fork_servers.servers):
        server.process.kill()
        server.process.wait()
    forked = Forked()
    forked.child.kill()
    assert forked.child.wait() == -9
    assert forked.line.recv(1) == b""  # nobody holds the other end
    other = Forked()
    assert other.heard()[2] == other.child.pid
    assert other.end() == 0


def test_a_running_child_is_killed_whatever_it_does():
    forked = Forked()
    forked.heard()
    os.kill(forked.child.pid, signal.SIGSTOP)
    forked.child.kill()
    assert forked.child.wait(20) == -9


def test_descriptors_beyond_the_first_1024_are_waited_for_too():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        forked = Forked()
        assert forked.line.fileno() > 1024
        assert forked.heard()[2] == forked.child.pid
        assert forked.end() == 0
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_program_may_be_divided_so_that_a_fork_of_it_is_the_server(tmp_path):
    """The server has none of the program's descriptors; where it dies another is started, and the workers come back."""
    script = f"""
import asyncio, glob, os, signal
from dilaserve import Config, Engine, Options
from dilaserve.system.child_processes import fork_servers

held = os.open({str(tmp_path)!r}, os.O_RDONLY)
(server,) = fork_servers.servers

async def main():
    async with Engine(Config.of(devices="cpu")) as engine:
        async def answer():
            return (await engine.generate([1, 2, 3], Options(max_tokens=8, ignore_eos=True))).token_ids
        (worker,) = engine.executor.workers.values()
        with open(f"/proc/{{worker.process.pid}}/stat") as file:
            print(int(file.read().rpartition(") ")[2].split()[1]) == server.process.pid)
        files = glob.glob(f"/proc/{{server.process.pid}}/fd/*")
        print({str(tmp_path)!r} in map(os.readlink, files), len(fork_servers.servers))
        first = await answer()
        os.kill(server.process.pid, signal.SIGKILL)
        print(await answer() == first, fork_servers.servers[0].process.pid != server.process.pid)

asyncio.run(main())
print(server.process.wait(), fork_servers.servers)
"""
    done = forked_python.run("-c", script)
    assert done.stdout.splitlines() == ["True", "False 1", "True True", "-9 []"], done


def test_a_program_with_threads_is_not_divided():
    """Locks that other threads hold would stay locked in the fork."""
    servers, over = child_processes.ForkServers(), threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    servers.divide(["dilaserve.worker.main"])
    over.set()
    thread.join()
    assert not servers.servers


def test_a_server_that_cannot_fork_says_why(monkeypatch):
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(os, "fork", refuse)
    with theirs:
        fork_server.Server(theirs).fork(b"", theirs, [])
    child = fork_server.ForkedChild("refused", mine)
    assert (child.poll(), child.refused.errno) == (1, 11)


def refuse():
    raise BlockingIOError(11, "Resource temporarily unavailable")


def test_settings_that_count_at_import_have_a_server_of_their_own(monkeypatch):
    first = Forked()
    monkeypatch.setenv("OMP_DISPLAY_ENV", "FALSE")
    second = Forked()
    assert fork_servers.forks[first.child] != fork_servers.forks[second.child]
    assert first.heard() != second.heard()
    assert {first.end(), second.end()} == {0}


def test_servers_end_with_their_last_user_and_with_their_process():
    """Also where that process is killed."""
    script = (
        "import os, sys, time; from dilaserve.system import child_processes as c; import test_fork_server as t\n"
        "with c.fork_servers.used():\n"
        "    forked = t.Forked(); forked.heard(); server = c.fork_servers.servers[0].process\n"
        "    if sys.argv[1] == 'leave': forked.end()\n"
        "    else: print(server.pid, forked.child.pid, flush=True); time.sleep(60)\n"
        "print(server.poll())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((HERE, str(Path(HERE).parent)))}
    words = [sys.executable, "-c", script]
    left = child_processes.subprocess.run([*words, "leave"], env=environment, capture_output=True, text=True)
    assert (left.stdout, left.stderr) == ("-9\n", "")
    with child_processes.subprocess.Popen(
        [*words, "stay"], env=environment, stdout=-1, text=True, start_new_session=True
    ) as killed:
        pids = [int(pid) for pid in killed.stdout.readline().split()]
        killed.kill()
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, pids))


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False
