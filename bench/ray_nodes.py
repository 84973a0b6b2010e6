"""What the door of `dilaserve ray` costs, and what a killed node costs: the real commands, real requests, kill -9.

    python bench/ray_nodes.py [--requests 300] [--kills 3] [--streams 16] [--out FILE]

latency  A bare server and a door before one node run side by side, and get the same request in turns, one at a time: an
         answer of one step, whole and as a stream. `added` is the difference of the same quantile.
kills    A door before two nodes; `streams` answers run when kill -9 ends a node. Lost: a stream that did not end as it
         should; wrong: one that has other tokens than undisturbed. Longest pause: between two pieces of one stream, of
         all streams. Both back: from the kill until two nodes report.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp

REQUEST = {"prompt": "Reverse: lamu", "max_tokens": 16}
STEPS = 96  # of each stream, one token a step
LONG = {
    "max_tokens": STEPS,
    "num_denoising_steps": STEPS,
    "ignore_eos": True,
    "cache": "none",
    "return_token_ids": True,
    "stream": True,
}
QUANTILES = (50, 99)
NODE = b"ray::ServeReplica:dilaserve:node"  # how the command line of its process begins


class Read(NamedTuple):
    """A stream that has ended: its tokens, the longest time between two pieces, and whether it ended as it should."""

    ids: list[int]
    pause: float
    whole: bool


@contextlib.contextmanager
def serving(*words: str) -> Iterator[str]:
    """The command as a process; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dilaserve", *words, "--port", str(port), "--devices", "cpu"]
    server = subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        for line in server.stdout:
            if line.startswith("ready:"):
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


async def timed(client: aiohttp.ClientSession, stream: bool) -> float:
    began = time.perf_counter()
    async with client.post("/v1/completions", json=REQUEST | {"stream": stream}) as response:
        await response.read()
        assert response.status == 200
    return time.perf_counter() - began


async def latency(requests: int) -> list[str]:
    with serving() as bare, serving("ray", "--nodes", "1") as door:
        rows = ["| | quantile | bare | door | added |", "|---|---|---|---|---|"]
        async with aiohttp.ClientSession(bare) as there, aiohttp.ClientSession(door) as here:
            for stream in (False, True):
                seconds: tuple[list[float], list[float]] = ([], [])
                for number in range(requests + 10):
                    for client, found in zip((there, here), seconds, strict=True):
                        took = await timed(client, stream)
                        found += [took] if number >= 10 else []
                for q in QUANTILES:
                    one, other = (1000 * quantile(found, q) for found in seconds)
                    what = "stream" if stream else "whole"
                    rows.append(f"| {what} | p{q} | {one:.1f} ms | {other:.1f} ms | {other - one:.1f} ms |")
        return rows


def quantile(values: Sequence[float], q: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[q - 1]


async def read(client: aiohttp.ClientSession, prompt: str) -> Read:
    ids: list[int] = []
    last, pause, ended = time.perf_counter(), 0.0, None
    with contextlib.suppress(aiohttp.ClientError, KeyError):
        async with client.post("/v1/completions", json={"prompt": prompt} | LONG) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                pause, last = max(pause, now - last), now
                (choice,) = json.loads(line[6:])["choices"]
                ids += choice.get("token_ids") or []
                ended = choice["finish_reason"] or ended
    return Read(ids, pause, ended == "length")


def nodes() -> list[int]:
    """The processes of nodes of this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(
                b"ray::ServeReplica:dilaserve:node"
            ):
                found.append(int(folder.name))
    return found


async def reporting(client: aiohttp.ClientSession) -> AsyncIterator[int]:
    """How many nodes report, again and again."""
    while True:
        async with client.get("/v1/plan") as response:
            yield len((await response.json()).get("nodes", {})) if response.status == 200 else 0
        await asyncio.sleep(0.1)


async def kills(count: int, streams: int) -> list[str]:
    rows = ["| kill | streams | lost | wrong | longest pause, undisturbed | longest pause | both back |"]
    rows.append("|---|---|---|---|---|---|---|")
    prompts = [f"Reverse: word{i}" for i in range(streams)]
    with serving("ray", "--nodes", "2") as door:
        async with aiohttp.ClientSession(door, connector=aiohttp.TCPConnector(limit=0)) as client:
            calm = await asyncio.gather(*(read(client, prompt) for prompt in prompts))
            for number in range(count):
                running = [asyncio.create_task(read(client, prompt)) for prompt in prompts]
                await asyncio.sleep(1.0)
                killed_at = time.perf_counter()
                os.kill(nodes()[0], signal.SIGKILL)
                found = await asyncio.gather(*running)
                async for there in reporting(client):
                    if there == 2:
                        break
                back = time.perf_counter() - killed_at
                lost = sum(not one.whole for one in found)
                wrong = sum(one.whole and one.ids != other.ids for one, other in zip(found, calm, strict=True))
                pauses = max(one.pause for one in calm), max(one.pause for one in found)
                told = f"{pauses[0]:.2f} s | {pauses[1]:.2f} s | {back:.1f} s"
                rows.append(f"| {number + 1} | {streams} | {lost} | {wrong} | {told} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None, help="also write the tables there")
    args = parser.parse_args()
    lines = [*asyncio.run(latency(args.requests)), "", *asyncio.run(kills(args.kills, args.streams))]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
