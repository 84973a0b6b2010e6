"""Worker processes of this one, and waiting for what happens in them."""

import asyncio
import os
import subprocess
from pathlib import Path


def children() -> set[int]:
    """Worker processes of this one."""
    return workers_of(os.getpid())


def workers_of(pid) -> set[int]:
    """Worker processes of a process: its fork servers have forked them."""
    servers = matching(pid, "dilaserve fork server")
    return set().union(*(matching(server, "dilaserve worker") for server in servers))


def matching(parent, pattern) -> set[int]:
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", pattern], capture_output=True, text=True)
    return {int(line) for line in found.stdout.split()}


def is_stopped(pid) -> bool:
    """Whether a signal has stopped the process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"


async def until(true):
    """Poll: what is waited for happens in another process."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
