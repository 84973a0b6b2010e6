"""Worker processes of this one, and waiting for what happens in them."""

import asyncio
import os
import subprocess


def children() -> set[int]:
    """Worker processes of this one."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "dilaserve worker"], capture_output=True, text=True)
    return {int(line) for line in found.stdout.split()}


async def until(true):
    """Poll: what is waited for happens in another process."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
