"""How the ranks of one TP group meet: sums, and gathers of small tensors. Knows peers and nothing of models.

No backend needs a new process or a world that all workers belong to, so any ranks can form a group at any time.
"""

import datetime
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from dilaserve.transport.collectives_memory import Exchange, first

c10d: Any = torch.distributed  # what it is made of has no types
SPINS = 300  # looks at a peer's counter before the core is offered to others
OFFERING = 300e-6  # seconds of that before sleeping between looks; who has slept is woken before who has spun
NAP = 50e-6  # seconds
Members = tuple[tuple[int, ...], tuple[int, ...]]  # ranks, and which of its lives each is in
WAIT = datetime.timedelta(minutes=30)  # of torch.distributed; the engine's watchdog is much sooner


class Abandoned(Exception):
    """A peer is gone and the instance with it; the worker itself is sound."""


class TPGroup(Protocol):
    """The ranks of one instance as one of them sees it. All of them make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's x, the same bits on all ranks; may overwrite x. Raises `Abandoned`."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Everybody's x in the order of ranks, [size, *x.shape]. Raises `Abandoned`."""

    def check(self) -> None:
        """Raises `Abandoned` where what has arrived from the device may be no result: a peer was gone meanwhile."""


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def check(self) -> None:
        """There is nobody to miss."""


class SharedMemory:
    """Through the exchange: write the own slot, raise the own counter, wait for the peers' counters, read all slots.

    One barrier a collective is enough: a rank that has reached the n-th has read all slots of the one before it, so
    its peers may fill those again. The order of writes is that of x86; other processors may show the counter first.
    Tensors of a GPU pass through host memory.
    """

    def __init__(self, exchange: Exchange, instance: int, ranks: Sequence[int], position: int) -> None:
        self.exchange, self.instance, self.ranks = exchange, instance, tuple(ranks)
        self.rank, self.size, self.me = position, len(ranks), ranks[position]
        self.peers = [rank for rank in ranks if rank != self.me]
        self.sequence = exchange.counters[self.me] = first(instance)
        self.end = first(instance + 1)
        self.parent = os.getppid()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        host = x.cpu().contiguous()
        for part in torch.split(host.view(-1), self.exchange.slot // x.itemsize):
            add(self.swapped(part), part)
        return host if x.device.type == "cpu" else x.copy_(host)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.cpu().contiguous().view(-1)
        step = self.exchange.slot // x.itemsize
        out = torch.empty(self.size, len(flat), dtype=x.dtype)
        for target, part in zip(torch.split(out, step, 1), torch.split(flat, step), strict=True):
            for row, slot in zip(target, self.swapped(part), strict=True):
                row.copy_(slot)
        return out.view(self.size, *x.shape).to(x.device)

    def check(self) -> None:
        """The host has waited in every call, and knows."""

    def swapped(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's part, in slots that stay as they are until the next but one call."""
        self.sequence += 1
        length, counters = part.nbytes, self.exchange.counters
        slots = [self.exchange.slots[rank, self.sequence & 1, :length].view(part.dtype) for rank in self.ranks]
        slots[self.rank].copy_(part)
        counters[self.me] = self.sequence
        for peer in self.peers:
            if counters[peer] < self.sequence:
                self.wait(peer)
            if counters[peer] >= self.end:
                raise Abandoned
        return slots

    def wait(self, peer: int) -> None:
        counters, target = self.exchange.counters, self.sequence
        for _ in range(SPINS):
            if counters[peer] >= target:
                return
        looks, until = 0, time.perf_counter() + OFFERING
        while counters[peer] < target:
            if self.exchange.abandoned(self.me, self.instance) or (looks % 1000 == 999 and os.getppid() != self.parent):
                raise Abandoned
            looks += 1
            if time.perf_counter() < until:
                os.sched_yield()
            else:
                time.sleep(NAP)


def add(slots: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Sum in the order of ranks, rounding once for types shorter than float32."""
    if len(slots) == 2 or out.dtype in (torch.float32, torch.float64):
        torch.add(slots[0], slots[1], out=out)
        for slot in slots[2:]:
            out.add_(slot)
        return
    total = slots[0].float()
    for slot in slots[1:]:
        total += slot.float()
    out.copy_(total)


class Distributed:
    """Through a process group of torch.distributed, gloo or NCCL.

    NCCL tells no host that a peer is gone: its kernels wait, and once they are aborted the device goes on with garbage.
    `abandoned` knows, before anybody aborts them.
    """

    def __init__(self, group: Any, rank: int, size: int, abandoned: Callable[[], bool]) -> None:
        self.group, self.rank, self.size, self.abandoned = group, rank, size, abandoned

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self.run(lambda: self.group.allreduce([x]))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        self.run(lambda: self.group.allgather([list(out.unbind())], [x.contiguous()]))
        return out

    def check(self) -> None:
        if self.abandoned():
            raise Abandoned

    def run(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise Abandoned from error


class Groups:
    """Makes the groups that this worker joins.

    `store` begins the names of files through which torch.distributed introduces peers, one for each process group.
    Those are kept as long as all members live, because NCCL takes long to make one. `lives` number the processes that a
    rank has had.
    """

    def __init__(self, backend: str, exchange: Exchange, rank: int, store: str) -> None:
        self.backend, self.exchange, self.me, self.store = backend, exchange, rank, store
        self.known: dict[Members, Any] = {}
        self.current = -1  # the instance that was joined last
        self.key: Members | None = None  # of the process group that it meets through
        self.guards: list[threading.Thread] = []

    def join(self, instance: int, ranks: Sequence[int], lives: Sequence[int]) -> TPGroup:
        position = list(ranks).index(self.me)
        self.current, self.key = instance, None
        self.forget(dict(zip(ranks, lives, strict=True)))
        if len(ranks) == 1:
            return Alone()
        if self.backend == "shm":
            return SharedMemory(self.exchange, instance, ranks, position)
        key = self.key = tuple(ranks), tuple(lives)
        if key not in self.known:
            try:
                self.known[key] = made(self.backend, self.store, key, position)
            except RuntimeError as error:
                raise Abandoned from error
        group = self.known[key]
        if self.backend == "nccl":
            self.guard(group, instance, key)
        return Distributed(group, position, len(ranks), lambda: self.exchange.abandoned(self.me, instance))

    def leave(self, instance: int) -> bool:
        """A member of the instance is gone, and so is what the others met through; whether this worker was of it."""
        if self.current != instance:
            return False
        self.current = -1
        if self.key:
            self.drop(self.key)
        return True

    def forget(self, lives: Mapping[int, int]) -> None:
        """Give up the groups of members that have another life now, by rank."""
        for key in list(self.known):
            if any(lives.get(rank, life) != life for rank, life in zip(*key, strict=True)):
                self.drop(key)

    def drop(self, key: Members) -> None:
        """End a process group: its threads and connections, and the file that introduced its members."""
        group = self.known.pop(key, None)
        if group is not None and self.backend == "nccl":
            group.abort()
        Path(file_of(self.store, key)).unlink(missing_ok=True)

    def guard(self, group: Any, instance: int, key: Members) -> None:
        """A kernel of NCCL waits for dead peers for ever; abort it when the engine says that they are.

        As long as the worker is of this instance: the next one may meet through the same group, and has its own guard.
        """

        def watch() -> None:
            while self.current == instance and not self.exchange.abandoned(self.me, instance):
                time.sleep(0.02)
            if self.current == instance and self.known.get(key) is group:
                self.drop(key)

        self.guards = [guard for guard in self.guards if guard.is_alive()]
        self.guards.append(threading.Thread(target=watch, daemon=True))
        self.guards[-1].start()

    def close(self) -> None:
        """Part from all groups before the process ends: none of their threads may outlive the interpreter."""
        self.current = -1
        for guard in self.guards:
            guard.join()
        if self.backend == "nccl":
            for group in self.known.values():
                group.abort()
        self.known.clear()


def file_of(store: str, key: Members) -> str:
    """Where members write how to reach them, such as store-0.1-3.7 for ranks 0 and 1 in their lives 3 and 7."""
    return "-".join([store, *(".".join(map(str, numbers)) for numbers in key)])


def made(backend: str, store: str, key: Members, position: int) -> Any:
    """A process group of these members alone, without a default group (torch.distributed's own constructors)."""
    meeting, size = c10d.FileStore(file_of(store, key), -1), len(key[0])
    if backend == "nccl":
        return c10d.ProcessGroupNCCL(meeting, position, size)
    return c10d.ProcessGroupGloo(meeting, position, size, WAIT)
