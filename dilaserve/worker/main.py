"""The life of a worker: load, say so, then step whenever a frame arrives, until the engine says stop or is gone."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from dilaserve import models
from dilaserve.errors import CheckpointError
from dilaserve.models.attention import varlen_for
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.transformer import Model
from dilaserve.models.weights import Weights
from dilaserve.system.shared_memory import SharedBytes
from dilaserve.transport import frames
from dilaserve.transport.collectives_memory import Exchange
from dilaserve.transport.request_table import RequestTable, private_bytes
from dilaserve.types import PAGE
from dilaserve.worker import memory, warm_up
from dilaserve.worker.forward_graphs import ForwardGraphs
from dilaserve.worker.graph_steps import ReuseSteps
from dilaserve.worker.model_runner import Runner
from dilaserve.worker.tp_group import Abandoned, Groups

NICE = 10  # of workers on CPUs: what waits for the loop between two steps is a core, so the loop goes first
PROGRESS_BYTES = 16 * 2**20  # between two progress frames


class WorkerJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with. `backend` carries TP groups, which may meet through the file `store`.

    Where the model is too large for one device, the weights are in `shards` parts, and workers of neighbouring ranks
    hold them one after the other.
    """

    device: str
    directory: str
    dtype: str
    max_length: int
    stop_ids: tuple[int, ...]
    threads: int
    kv_tokens: int | None
    kv_wanted: int
    batched_tokens: int
    claim: memory.Claim
    max_rows: int = 64
    eager: bool = False
    backend: str = "shm"
    shards: int = 1
    store: str = ""


class Shared(NamedTuple):
    """The memory that the engine's process and all workers map."""

    table: RequestTable
    exchange: Exchange

    @property
    def descriptors(self) -> list[int]:
        """Which a worker has to inherit."""
        return [part.memory.fd for part in self if isinstance(part.memory, SharedBytes)]


def main(job: WorkerJob, rank: int, shared: Shared, fd: int) -> None:
    """Entry point of the child process; `fd` is its end of the line to the engine."""
    line = socket.socket(fileno=fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    if torch.device(job.device).type == "cpu":
        os.nice(NICE)
    try:
        worker = prepare(job, rank, shared, line)
        with contextlib.closing(worker.groups):
            serve(worker, line)
    except (BrokenPipeError, ConnectionResetError):
        return  # the engine is gone, and so is the reason to be here
    except Exception as error:
        with contextlib.suppress(OSError):
            frames.send(line, frames.Broken(sentence(error)))
        sys.exit(1)


def sentence(error: Exception) -> str:
    """Why the worker leaves, on one line."""
    lines = str(error).splitlines() or ["out of memory" if isinstance(error, MemoryError) else ""]
    return lines[0] if isinstance(error, CheckpointError) else f"{type(error).__name__}: {lines[0]}"


class Worker:
    """The weights and the memory of one device, of which any instance that the device joins is a view."""

    def __init__(
        self, job: WorkerJob, rank: int, shared: Shared, spec: ModelSpec, weights: Weights, flat: torch.Tensor
    ) -> None:
        self.job, self.shared, self.spec, self.weights, self.flat = job, shared, spec, weights, flat
        self.reuse: ReuseSteps | None = None  # for instances of this device alone, as is `forward`
        self.forward: ForwardGraphs | None = None
        self.groups = Groups(job.backend, shared.exchange, rank, job.store)
        self.turns: torch.Tensor | None = None

    def stops_early(self, batch: int) -> Callable[[], bool]:
        """Tells whether somebody waits for the batch to end."""
        return lambda: self.shared.exchange.stops_early(self.groups.me, batch)

    def form(self, order: frames.JoinInstance) -> Runner:
        """Join an instance; no weight is copied. Raises `Abandoned`."""
        ranks = sorted(order.ranks, key=lambda rank: (rank % self.job.shards, rank))  # in the order of what they hold
        lives = dict(zip(order.ranks, order.lives, strict=True))
        group = self.groups.join(order.instance, ranks, [lives[rank] for rank in ranks])
        shard = Shard(group.rank, group.size)
        model = models.model(self.spec, self.weights, shard, group.all_reduce, self.turns)
        self.turns = model.turns
        pool = KVPool(self.spec, shard, self.flat)
        if group.size == 1:
            self.prepare_alone(model, pool)
        reuse, forward = (self.reuse, self.forward) if group.size == 1 else (None, None)
        table, tokens = self.shared.table, self.job.batched_tokens
        return Runner(
            self.spec, model, pool, table, self.job.stop_ids, group, reuse, tokens, forward, self.job.max_rows
        )

    def prepare_alone(self, model: Model, pool: KVPool) -> None:
        """Steps on fixed buffers, once: whenever the device is alone they read the same memory. Not where they would
        not pay.
        """
        varlen = varlen_for(self.flat.device, self.flat.dtype, self.spec.head_dim)
        if self.reuse is None and varlen and not model.waits and self.spec.noise is None:
            self.reuse = ReuseSteps(self.spec, model, pool, self.job.max_rows, self.job.eager)
            self.forward = ForwardGraphs(self.spec, model, pool, self.job.batched_tokens, self.job.eager)


def prepare(job: WorkerJob, rank: int, shared: Shared, line: socket.socket) -> Worker:
    """Load the model and lay out its memory; sends `Loading` frames on the way and `Ready` at the end."""
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        memory.pin(shared.table.buffer, device)
    checkpoint = Checkpoint(Path(job.directory))
    spec = msgspec.structs.replace(models.describe(checkpoint), max_length=job.max_length)
    memory.check_weights(spec, device, dtype, job.claim, job.shards)
    held = Shard(rank % job.shards, job.shards)
    weights = models.load(spec, checkpoint.tensors(), device, dtype, progress(spec, checkpoint, line), held)
    tokens = kv_tokens(job, spec, weights)
    flat = zeros((tokens + PAGE) * spec.kv_elements, dtype, device)  # the last page pads batches
    frames.send(line, frames.Ready(tokens, spec.shard_parameters(job.shards) * dtype.itemsize, flat.nbytes))
    return Worker(job, rank, shared, spec, weights, flat)


def zeros(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU, memory is taken where they are written: a pool is as large as the rows that have used it."""
    if device.type != "cpu":
        return torch.zeros(elements, dtype=dtype, device=device)
    return private_bytes(elements * dtype.itemsize).view(dtype)


def kv_tokens(job: WorkerJob, spec: ModelSpec, weights: Weights) -> int:
    """The K/V pool that was asked for, or else what is wanted and fits beside the largest step."""
    device, dtype = weights.norm.device, weights.norm.dtype
    if device.type == "cuda":
        model = models.model(spec, weights, weights.held)
        need = warm_up.nbytes(spec, model, job.batched_tokens, job.max_rows)
    else:
        need = memory.activation_bytes(spec, dtype, job.batched_tokens)
    if job.kv_tokens is not None:
        spared = need if device.type == "cuda" else 0
        memory.check_pool(spec, device, dtype, job.claim, job.kv_tokens, spared)
        return job.kv_tokens
    tokens = memory.kv_tokens(spec, device, dtype, job.claim, job.kv_wanted, need)
    if tokens < PAGE:
        raise CheckpointError(
            f"{device} has no memory left for a K/V pool after the weights and a step of {job.batched_tokens} tokens; "
            "lower --max-num-batched-tokens or use a smaller model"
        )
    return tokens


def progress(spec: ModelSpec, checkpoint: Checkpoint, line: socket.socket) -> Callable[[int], None]:
    """A callback that counts placed bytes and reports them now and then."""
    total = spec.parameters * checkpoint.itemsize
    done = reported = 0

    def placed(nbytes: int) -> None:
        nonlocal done, reported
        done += nbytes
        if done - reported >= PROGRESS_BYTES:
            reported = done
            frames.send(line, frames.Loading(done, total))

    return placed


def serve(worker: Worker, line: socket.socket) -> None:
    """Obey until the engine is gone. A step or a group that a lost peer has spoilt is dropped.

    The engine knows of the loss, and asks with `Leave` for the word that nothing of the instance is under way.
    """
    runner: Runner | None = None
    while not isinstance(order := frames.receive_order(line), frames.Stop | None):
        with contextlib.suppress(Abandoned):
            if isinstance(order, frames.JoinInstance):
                runner = worker.form(order)
                frames.send(line, frames.Formed(order.instance))
            elif isinstance(order, frames.Leave):
                runner = None if worker.groups.leave(order.instance) else runner
                frames.send(line, frames.Left(order.instance))
            elif runner:
                runner.copy(order.copies)
                for outcome in runner.steps(order.spans, order.steps, order.then, worker.stops_early(order.batch)):
                    frames.send(line, frames.Done(order.batch, *outcome))
