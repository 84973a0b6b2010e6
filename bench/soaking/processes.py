"""A server process under test: started, watched from outside through /proc, and ended without leftovers."""

import asyncio
import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = os.sysconf("SC_PAGE_SIZE")
START_WITHIN = 180.0  # seconds until the ready line
STOP_WITHIN = 60.0  # seconds from SIGTERM to the exit
ADMIN_KEY = "admin"


class Server(NamedTuple):
    process: asyncio.subprocess.Process
    host: str
    port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def up(self) -> bool:
        return self.process.returncode is None

    def workers(self) -> list[int]:
        """Process ids of the workers that exist now, loading ones included."""
        servers = [pid for pid in children_of(self.pid) if "dilaserve fork server" in command(pid)]
        forks = [pid for server in servers for pid in children_of(server)]
        return [pid for pid in forks if "dilaserve worker" in command(pid)]

    def tracebacks(self) -> list[str]:
        """The last line of every traceback in the log."""
        found, inside = [], False
        for line in self.log.read_text(errors="replace").splitlines():
            if inside and not line.startswith(" ") and line:
                found.append(line[:200])
                inside = False
            inside |= line.startswith("Traceback")
        return found

    def resident(self) -> int:
        """Resident bytes of the server's own process, without its workers."""
        return resident(self.pid)


@contextlib.asynccontextmanager
async def serving(flags: Sequence[str], ends: list[str]) -> AsyncIterator[Server]:
    """A server on a free port; appends to `ends` what was wrong with its end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the server below too
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        log = Path(directory) / "log"
        line = [sys.executable, "-m", "dilaserve", "--port", "0", "--log-level", "warning", *flags]
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(*line, stdout=subprocess.PIPE, stderr=file)
        try:
            server = await ready(process, log)
            yield server
            ends += await ended(server)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def ready(process: asyncio.subprocess.Process, log: Path) -> Server:
    assert process.stdout
    line = (await asyncio.wait_for(process.stdout.readline(), START_WITHIN)).decode()
    address = re.search(r"http://([^:/\s]+):(\d+)", line)
    if not address:
        raise SystemExit(f"the server has not started: {line}{tail(log)}")
    return Server(process, address[1], int(address[2]), log)


async def ended(server: Server) -> list[str]:
    """Ask the server to end; what was wrong with how it did."""
    if not server.up:
        return [f"the server has ended by itself with exit code {server.process.returncode}: {tail(server.log)}"]
    family = children_of(server.pid)
    server.process.terminate()
    try:
        code = await asyncio.wait_for(server.process.wait(), STOP_WITHIN)
    except TimeoutError:
        return [f"the server has not ended within {STOP_WITHIN:g} s of SIGTERM"]
    await asyncio.sleep(1.0)  # init reaps what is left
    wrong = [f"exit code {code}: {tail(server.log)}"] if code else []
    wrong += [f"left behind: process {pid}" for pid in family if command(pid)]
    shared = [*glob.glob(f"/dev/shm/*{server.pid}*"), *glob.glob(f"{tempfile.gettempdir()}/dilaserve-{server.pid}-*")]
    return wrong + [f"left behind: {name}" for name in shared]


def tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").splitlines()[-5:])


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for file in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            found += map(int, Path(file).read_text().split())
    return found


def command(pid: int) -> str:
    """The command line; empty once the process is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many cores busy with processes that spin."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
