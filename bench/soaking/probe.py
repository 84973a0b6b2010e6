"""How long the server's event loop lets /health wait, measured by a process of its own.

    python bench/soaking/probe.py HOST PORT PID

On a machine with few cores a late answer can also mean that the server, or this probe, waited for a core. Linux counts
both (`/proc/PID/schedstat`), so each wait is told as it was seen and without these two shares. What is left is time in
which the loop ran something else, or its thread waited for a lock.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

EVERY = 0.01  # seconds between two questions
STALL = 0.05  # seconds that the loop may keep /health waiting
ASK = b"GET /health HTTP/1.1\r\nhost: probe\r\n\r\n"


class Wait(NamedTuple):
    """Seconds from question to answer, and those without the time that server and probe waited for a core."""

    at: float  # Unix seconds
    seen: float
    own: float


class Waits(NamedTuple):
    asked: int
    most: float
    stalls: list[Wait]  # those seen as stalls

    @property
    def own(self) -> list[Wait]:
        return [wait for wait in self.stalls if wait.own > STALL]


def unscheduled(pid: int | str) -> float:
    """Seconds that the first thread of a process has waited for a core so far; 0 where Linux does not count."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


async def measure(host: str, port: int, pid: int) -> None:
    """Ask until standard input ends; print the waits as JSON."""
    stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    asked, most, stalls = 0, 0.0, []
    reader, writer = await asyncio.open_connection(host, port)
    me = os.getpid()
    while not stop.done():
        before, began = unscheduled(pid) + unscheduled(me), time.perf_counter()
        try:
            writer.write(ASK)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
        except (OSError, EOFError):
            break  # the server has gone; others say so
        seen = time.perf_counter() - began
        asked, most = asked + 1, max(most, seen)
        if seen > STALL:
            stalls.append(Wait(time.time() - seen, seen, seen - (unscheduled(pid) + unscheduled(me) - before)))
        await asyncio.sleep(EVERY)
    print(json.dumps([asked, most, stalls]))


@contextlib.asynccontextmanager
async def probing(host: str, port: int, pid: int) -> AsyncIterator[list[Waits]]:
    """Probe while the block runs; the list holds the waits afterwards."""
    line = [sys.executable, __file__, host, str(port), str(pid)]
    process = await asyncio.create_subprocess_exec(*line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    found: list[Waits] = []
    try:
        yield found
        written, _ = await process.communicate(b"")
        asked, most, stalls = json.loads(written)
        found.append(Waits(asked, most, [Wait(*stall) for stall in stalls]))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    asyncio.run(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
