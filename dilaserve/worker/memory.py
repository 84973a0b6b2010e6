"""How much of a device's memory is there, and how it is divided between weights, activations and K/V."""

import contextlib
import logging
import sys
from pathlib import Path

import msgspec
import torch

from dilaserve.errors import CheckpointError
from dilaserve.models.spec import ModelSpec
from dilaserve.system import host
from dilaserve.types import PAGE

log = logging.getLogger(__name__)
GIB = 2**30
LOGITS_BYTES = 2**30  # the runner works on slices of the logits; this bounds one with its copies
LOGITS_COPIES = 4  # of one slice, in float32
HOST_SHARE = 0.9  # of the host's memory that is left at the start, which CPU workers divide; the rest is spared


class Claim(msgspec.Struct, frozen=True):
    """The parts of a GPU's memory that a worker may use, and that nobody may; workers of one GPU divide the rest.

    A CPU worker may have `nbytes` of the host's memory, itself included; `origin` tells the log how that came about.
    """

    share: float = 1.0
    spared: float = 0.0
    nbytes: int = sys.maxsize
    origin: str = ""


def host_claim(workers: int) -> Claim:
    """The part of the host's memory for each of so many CPU workers, divided once, before any of them has started."""
    left = host.memory_left()
    each = int(HOST_SHARE * left.nbytes / workers)
    origin = (
        f"{each / GIB:.2f} GiB for each CPU worker: {workers} of them share {100 * HOST_SHARE:.0f} % "
        f"of the {left.nbytes / GIB:.2f} GiB that {left.bound} leaves"
    )
    return Claim(nbytes=each, origin=origin)


def pin(buffer: torch.Tensor, device: torch.device) -> None:
    """Register the request table with CUDA, so that its pages stay and a device can read them; goes on where
    that fails, as steps gather what they need of it in pinned memory of their own.
    """
    code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        log.warning("the request table could not be pinned (CUDA error %s); steps do without", int(code))
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # CUDA tells of the error once more, with the next kernel, whosoever it is


def check_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, claim: Claim, shards: int = 1) -> None:
    """Raise `CheckpointError` when the weights of one of so many shards do not fit."""
    need, there = spec.shard_parameters(shards) * dtype.itemsize, available(device, claim)
    if need > there:
        raise CheckpointError(
            f"the model needs {need / GIB:.1f} GiB for its weights in {str(dtype).removeprefix('torch.')} "
            f"and {device} has {there / GIB:.1f} GiB; use a larger device or a smaller --dtype"
        )


def check_pool(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, claim: Claim, tokens: int, step: int = 0
) -> None:
    """Raise `CheckpointError` when a K/V pool of this size holds nothing, or does not fit beside the weights and `step`
    bytes for the largest step.
    """
    if tokens < PAGE:
        raise CheckpointError(f"--kv-cache-tokens {tokens} is less than a page of {PAGE}; raise it")
    need, there = tokens * spec.kv_elements * dtype.itemsize, max(0, available(device, claim) - step)
    if need > there:
        raise CheckpointError(
            f"--kv-cache-tokens {tokens} takes {need / GIB:.1f} GiB and {device} has {there / GIB:.1f} GiB left; "
            "lower it"
        )


def kv_tokens(spec: ModelSpec, device: torch.device, dtype: torch.dtype, claim: Claim, wanted: int, step: int) -> int:
    """K/V tokens that fit beside `step` bytes for the largest step: what is wanted, or what memory leaves of it."""
    left = available(device, claim) - step
    fits = left // (spec.kv_elements * dtype.itemsize) - PAGE  # a page is nobody's
    return max(0, min(wanted, fits)) // PAGE * PAGE


def activation_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> int:
    """An upper bound of what one step of `tokens` packed tokens allocates."""
    layer = tokens * (8 * spec.hidden + 4 * spec.mlp) * dtype.itemsize
    if spec.experts is not None:
        copies = 4 * spec.hidden + 3 * spec.experts.width  # of each choice: row, result, its place, weighed; gate, up
        wide = spec.hidden * spec.experts.float32_sum * 8  # bytes of each choice in float32, twice
        layer += tokens * spec.experts.chosen * (copies * dtype.itemsize + wide)
        layer += tokens * (4 * spec.experts.shared * dtype.itemsize + 16 * spec.experts.count)
    return layer + min(LOGITS_BYTES, LOGITS_COPIES * 4 * tokens * spec.vocab_size)


def available(device: torch.device, claim: Claim) -> int:
    """Bytes that this process may still take there. What others have taken of a GPU counts against what is free alone,
    not against the own share.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine = torch.cuda.memory_reserved(device)
        return max(0, int(min(free - claim.spared * total, claim.share * total - mine)))
    return max(0, min(claim.nbytes - own(), host.memory_left().nbytes))


def own() -> int:
    """Bytes of the host's memory that this process has taken for itself; files that it maps are not among them."""
    fields = host.entries(Path("/proc/self/status"))
    return 1024 * fields.get("RssAnon", 0)
