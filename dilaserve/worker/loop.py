"""The life of a worker: load, say so, then step whenever a frame arrives, until the engine says stop or is gone."""

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from dilaserve import models, wire
from dilaserve.errors import CheckpointError
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.kvcache import KVPool
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.pages import PAGE
from dilaserve.table import RequestTable
from dilaserve.worker import memory
from dilaserve.worker.runner import Runner

PROGRESS_BYTES = 16 * 2**20  # between two progress frames


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with."""

    device: str
    directory: str
    dtype: str
    max_length: int
    stop_ids: tuple[int, ...]
    threads: int
    kv_tokens: int | None
    kv_wanted: int
    batched_tokens: int
    memory_share: float


def main(job: Job, table: RequestTable, line: socket.socket) -> None:
    """Entry point of the child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    try:
        runner = prepare(job, table, line)
    except (CheckpointError, torch.OutOfMemoryError, MemoryError) as error:
        wire.send(line, wire.Broken(str(error).splitlines()[0] if str(error) else "out of memory"))
        return
    except BrokenPipeError:
        return
    try:
        serve(runner, line)
    except (BrokenPipeError, ConnectionResetError):
        return  # the engine is gone, and so is the reason to be here


def prepare(job: Job, table: RequestTable, line: socket.socket) -> Runner:
    """Load the model and lay out its memory; sends `Loading` frames on the way and `Ready` at the end."""
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        memory.pin(table.buffer)
    checkpoint = Checkpoint(Path(job.directory))
    spec = msgspec.structs.replace(models.describe(checkpoint), max_length=job.max_length)
    family = models.FAMILIES[spec.architecture]
    memory.check_weights(spec, device, dtype, job.memory_share)
    weights = family.load(spec, checkpoint.tensors(), device, dtype, progress(spec, checkpoint, line))
    tokens = kv_tokens(job, spec, device, dtype)
    pool = KVPool(spec, Shard(), tokens, device, dtype)
    runner = Runner(spec, family.Model(spec, weights), pool, table, job.stop_ids)
    wire.send(line, wire.Ready(tokens))
    return runner


def kv_tokens(job: Job, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> int:
    """The K/V pool that was asked for, or else what is wanted and fits."""
    if job.kv_tokens is not None:
        memory.check_pool(spec, device, dtype, job.memory_share, job.kv_tokens)
        return job.kv_tokens
    tokens = memory.kv_tokens(spec, device, dtype, job.memory_share, job.kv_wanted, job.batched_tokens)
    if tokens < PAGE:
        raise CheckpointError(f"{device} has no memory left for a K/V pool after the weights")
    return tokens


def progress(spec: ModelSpec, checkpoint: Checkpoint, line: socket.socket) -> Callable[[int], None]:
    """A callback that counts placed bytes and reports them now and then."""
    total = spec.parameters * checkpoint.itemsize
    done = told = 0

    def placed(nbytes: int) -> None:
        nonlocal done, told
        done += nbytes
        if done - told >= PROGRESS_BYTES:
            told = done
            wire.send(line, wire.Loading(done, total))

    return placed


def serve(runner: Runner, line: socket.socket) -> None:
    while isinstance(order := wire.receive_order(line), wire.Run):
        outcome = runner.step(order.spans)
        wire.send(line, wire.Done(order.batch, outcome.results, outcome.seconds, outcome.forward))
