"""Worker processes of this one, and waiting for what happens in them."""

import asyncio
import os
import subprocess


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


async def until(true):
    """Poll: what is waited for happens in another process."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
