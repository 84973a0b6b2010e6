"""How long hostile request bodies hold up the server's event loop, and what memory they leave behind.

`python bench/stalls.py` starts a server of the bundled model on the CPU and sends every shape of body alone and in a
crowd. It prints the longest stall that a probe inside the server process saw, and the slowest answer of /health.
"""

import asyncio
import gzip
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LARGE = 4 * 2**20  # bytes of a body that the server takes by default
CROWD = 100
TICK = 0.001  # seconds between two looks of the probe
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGE, PART = '{"role":"user","content":""}', '{"type":"text"}'
SLOW = "1.2345678901234567e308"  # a number that takes 20 microseconds to read
COMPLETIONS = {  # by name: what stands before, what is repeated, what stands behind
    "prompts with echo": ('{"echo":true,"prompt":[[1]', ",[1]", "]}"),
    "prompts": ('{"prompt":[[1]', ",[1]", "]}"),
    "prompts of text": ('{"echo":true,"prompt":["a"', ',"a"', "]}"),
    "token ids": ('{"echo":true,"prompt":[1', ",1", "]}"),
    "tools": ('{"prompt":"a","tools":[[]', ",[]", "]}"),
    "stop strings": ('{"prompt":"a","stop":["a"', ',"a"', "]}"),
    "unknown fields": ('{"prompt":"a"', ',"":1', "}"),
    "one field, again and again": ('{"prompt":"a"', f',"temperature":{SLOW}', "}"),
    "nesting": ('{"prompt":', "[", ""),
    "nested objects": ('{"prompt":"a","tools":', '{"a":', ""),
    "a huge number": ('{"prompt":"a","n":', "9", "}"),
    "slow fractions": ('{"prompt":"a","tools":[1', f",{SLOW}", "]}"),
    "a long text": ('{"prompt":"', "hello ", '"}'),
    "escapes": ('{"prompt":"', "\\u00e9", '"}'),
    "short escapes": ('{"prompt":"', "\\n", '"}'),
    "a string without end": ('{"prompt":"', "\\u00e9", ""),
    "half surrogates": ('{"prompt":"', "\\ud83d", '"}'),
}


class Shape(NamedTuple):
    path: str
    body: bytes
    gzipped: bool = False
    chunked: bool = False  # the body is already written in pieces


class Seen(NamedTuple):
    """`stall`: longest delay of a timer on the server's loop; `health`: slowest /health, both in seconds."""

    stall: float
    health: float
    statuses: set[int]


def filled(head: str, unit: str, tail: str, size: int = LARGE) -> bytes:
    """`unit` repeated between `head` and `tail`, to just below `size` bytes."""
    return head.encode() + unit.encode() * ((size - len(head) - len(tail)) // len(unit.encode())) + tail.encode()


def shapes(size: int = LARGE) -> dict[str, Shape]:
    """Bodies of about `size` bytes, each of which once took long to refuse."""
    return {name: Shape("/v1/completions", filled(*parts, size)) for name, parts in COMPLETIONS.items()} | {
        "logit_bias": numbered('"%d":1', '{"prompt":"a","logit_bias":{', "}}", size // 12),
        "unknown names": numbered('"k%d":1', '{"prompt":"a",', "}", 9000),
        "a long role": Shape(CHAT, filled('{"messages":[{"content":"","role":"', "é", '"}]}', size)),
        "messages": Shape(CHAT, filled(f'{{"messages":[{MESSAGE}', f",{MESSAGE}", "]}", size)),
        "messages within limits": Shape(CHAT, filled(f'{{"messages":[{MESSAGE}', f",{MESSAGE}", "]}", 230_000)),
        "parts": Shape(CHAT, filled(f'{{"messages":[{{"role":"user","content":[{PART}', f",{PART}", "]}]}", size)),
        "spaces": Shape(COMPLETE, b" " * size),
        "spaces, compressed": Shape(COMPLETE, gzip.compress(b" " * size), True),
        "prompts, compressed": Shape(COMPLETE, gzip.compress(filled('{"prompt":[[1]', ",[1]", "]}", size)), True),
        "small members": Shape(COMPLETE, gzip.compress(b" ") * min(190_000, size // 21), True),
        "ids to text": Shape("/detokenize", filled('{"tokens":[1', ",1", "]}", 520_000)),
        "text to ids": Shape("/tokenize", filled('{"prompt":"', "hello ", '"}', 260_000)),
        "short and slow": Shape(COMPLETE, filled('{"prompt":"a","tools":[1', f",{SLOW}", "]}", 11_000)),
        "short prompts": Shape(COMPLETE, filled('{"prompt":[[1]', ",[1]", "]}", 16_000)),
        "pieces of one byte": Shape(COMPLETE, b"1\r\n \r\n" * (size // 6) + b"0\r\n\r\n", chunked=True),
    }


def numbered(item: str, head: str, tail: str, count: int) -> Shape:
    return Shape(COMPLETE, (head + ",".join(item % number for number in range(count)) + tail).encode())


class Server:
    """A server process with a probe on its event loop."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def worst(self) -> float:
        """The longest stall since the last time this was asked, in seconds."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def resident(self) -> int:
        """Bytes of memory of the server process."""
        return 4096 * int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])

    def send(self, shape: Shape) -> int:
        """The status that a body gets; 0 where the connection ended without one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"content-type": "application/json"} | ({"content-encoding": "gzip"} if shape.gzipped else {})
        headers |= {"transfer-encoding": "chunked"} if shape.chunked else {"content-length": str(len(shape.body))}
        try:
            connection.request("POST", shape.path, shape.body, headers)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def health(self) -> float:
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        return time.perf_counter() - began


@contextmanager
def server(*settings: str) -> Iterator[Server]:
    command = [sys.executable, __file__, "serve", *settings]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            found = re.search(r":(\d+)$", process.stdout.readline().strip())
            assert found, "the server did not start"
            yield Server(process, int(found[1]))
        finally:
            process.terminate()
            process.wait(60)


def drive(target: Server, shape: Shape, crowd: int) -> Seen:
    """Send a body `crowd` times at once, and ask for /health until all are answered."""
    target.worst()
    slowest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal slowest
        while not done.is_set():
            slowest = max(slowest, target.health())
            done.wait(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(crowd) as senders:
        statuses = set(senders.map(target.send, [shape] * crowd))
    done.set()
    watcher.join()
    return Seen(target.worst(), slowest, statuses)


def unfinished(target: Server, count: int, size: int = LARGE) -> tuple[int, int, int]:
    """Bytes of memory before, with, and after `count` bodies of `size` bytes that lack their last one."""
    before = target.resident()
    head = f"POST {COMPLETE} HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    sent = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(count)]
    for one in sent:
        one.settimeout(5.0)
        try:
            one.sendall(head.encode() + b" " * (size - 1))
        except OSError:
            continue  # refused: the server reads no more of it
    within = target.resident()
    for one in sent:
        one.close()
    time.sleep(3.0)
    return before, within, target.resident()


async def serve(settings: dict[str, str]) -> None:
    from dilaserve import Config, Engine
    from dilaserve.server.app import freeze, running

    loop, worst = asyncio.get_running_loop(), 0.0

    def told() -> None:
        nonlocal worst
        if not sys.stdin.readline():
            loop.remove_reader(sys.stdin)
            return
        print(worst, flush=True)
        worst = 0.0

    config = Config.of(**{"devices": "cpu", "port": "0", **settings})
    async with Engine(config) as engine, running(engine, config) as address:
        freeze()
        loop.add_reader(sys.stdin, told)
        print(address, flush=True)
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK)
            worst = max(worst, time.perf_counter() - began - TICK)


def main() -> None:
    with server() as target:
        target.send(Shape("/v1/completions", json.dumps({"prompt": "hello"}).encode()))
        print(f"milliseconds:{'':26} alone: stall       health {CROWD} at once:      health   statuses")
        for name, shape in shapes().items():
            alone, crowd = drive(target, shape, 1), drive(target, shape, CROWD)
            times = [f"{1000 * seconds:12.1f}" for seconds in (alone.stall, alone.health, crowd.stall, crowd.health)]
            print(f"{name:28} {len(shape.body):9}", *times, sorted(alone.statuses | crowd.statuses), flush=True)
        before, within, after = (nbytes / 2**20 for nbytes in unfinished(target, 300))
        print(f"300 unfinished bodies of 4 MiB: {before:.0f} MiB before, {within:.0f} with them, {after:.0f} after")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        import uvloop

        try:
            uvloop.run(serve(dict(word.split("=", 1) for word in sys.argv[2:])))
        except KeyboardInterrupt:
            sys.exit(0)
    else:
        main()
