"""The frames between the engine and a worker: rows, never tokens. One frame is one datagram of a socket pair.

A datagram is doorbell and message in one system call, and its end tells each side that the other is gone.
"""

import socket
from typing import TypeAlias

import msgspec

from dilaserve.system import child_processes
from dilaserve.types import Copy, RowResult, Span

MAX_FRAME = 2**20


class JoinInstance(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Engine to worker: from now on be a member of this instance; `lives` number the processes of its ranks."""

    instance: int
    ranks: list[int]
    lives: list[int]


class RunBatch(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Engine to worker: step with these rows, `steps` times at most, as `types.Batch` tells."""

    batch: int
    spans: list[Span]
    steps: int = 1
    then: list[list[Span]] = []
    copies: list[Copy] = []


class Leave(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Engine to worker: a member of this instance is gone; say so when you do nothing for the instance any more."""

    instance: int


class Stop(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Engine to worker: leave."""


class Loading(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Worker to engine: so many bytes of the weights are in place."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Worker to engine: loaded; the K/V pool holds this many tokens at degree 1. Bytes of weights and pool."""

    kv_tokens: int
    weights: int
    pool: int


class Formed(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Worker to engine: this rank has joined the instance."""

    instance: int


class Left(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Worker to engine: this rank has left the instance and writes to none of its rows any more."""

    instance: int


class Broken(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Worker to engine: I leave, and why."""

    message: str


class Done(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True):
    """Rank 0 to engine: the step is finished; `forward` of its `seconds` were spent in the model.

    `last`: the batch is, too.
    """

    batch: int
    results: list[RowResult]
    seconds: float
    forward: float
    last: bool = True


Order: TypeAlias = JoinInstance | RunBatch | Leave | Stop
Report: TypeAlias = Loading | Ready | Formed | Left | Broken | Done

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
_reports = msgspec.msgpack.Decoder(Report)


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of one line, the second for a child; datagrams keep their borders."""
    kind = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    ends = one, socket.socket(fileno=child_processes.heritable(other.detach()))
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_FRAME)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MAX_FRAME)
    return ends


def send(line: socket.socket, frame: Order | Report) -> None:
    line.send(_encoder.encode(frame))


def receive_order(line: socket.socket) -> Order | None:
    """The next order, or None when the engine is gone."""
    data = line.recv(MAX_FRAME)
    return _orders.decode(data) if data else None


def receive_report(line: socket.socket) -> Report | None:
    """The next report, or None when the worker is gone."""
    data = line.recv(MAX_FRAME)
    return _reports.decode(data) if data else None
