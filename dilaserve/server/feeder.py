"""Hands what connections receive to their HTTP parsers, within half of the event loop's time.

A body in pieces of one byte makes the parser work for a quarter of a second on what one read returns.
"""

import asyncio
import time
from collections import deque
from typing import Protocol

AT_ONCE = 0.002  # seconds of parsing after which the rest waits
LEAST = 4096  # bytes that are parsed at a time where parsing is slow
QUICK = 0.0002  # seconds in which a part must be parsed for the next to be four times as large


class Fed(Protocol):
    """A connection."""

    pending: bytearray  # what it has received and not parsed

    def parse(self, data: bytes) -> None: ...

    def drained(self) -> None: ...


class Feeder:
    """All connections of a server take turns."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: deque[Fed] = deque()
        self.free_at = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def feed(self, connection: Fed, data: bytes) -> None:
        """Parse it now, if that is quick and nothing waits; `connection.drained` is called when what waited is done."""
        if connection.pending:
            connection.pending += data
        elif self.waiting or self.free_at - time.perf_counter() > AT_ONCE:
            self.wait(connection, data)
        elif rest := self.some(connection, data):
            self.wait(connection, rest)

    def wait(self, connection: Fed, data: bytes) -> None:
        connection.pending += data
        self.waiting.append(connection)
        if self.timer is None:
            self.timer = self.loop.call_later(max(0.0, self.free_at - time.perf_counter()), self.turn)

    def turn(self) -> None:
        """The next connection has its turn, and goes to the end of the queue if that was not enough."""
        self.timer = None
        connection = self.waiting.popleft()
        rest = self.some(connection, bytes(connection.pending))
        connection.pending.clear()
        if rest:
            self.wait(connection, rest)
        else:
            connection.drained()
        if self.waiting and self.timer is None:
            self.timer = self.loop.call_later(max(0.0, self.free_at - time.perf_counter()), self.turn)

    def some(self, connection: Fed, data: bytes) -> bytes:
        """Parse for `AT_ONCE` seconds or a little longer; gives what is left."""
        began = now = time.perf_counter()
        start, size = 0, LEAST
        while start < len(data) and now - began < AT_ONCE:
            connection.parse(data[start : start + size])
            start += size
            took, now = time.perf_counter() - now, time.perf_counter()
            size = 4 * size if took < QUICK else LEAST
        self.free_at = max(self.free_at, began) + 2 * (now - began)
        return data[start:]
