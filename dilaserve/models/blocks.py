"""The parts that families are built from: packed spans, attention over them, rotary positions."""

import functools
import importlib.util
import logging
import math

import torch
import torch.nn.functional as F

from dilaserve.models.spans import Kernels
from dilaserve.models.spec import QueryScale, Yarn

log = logging.getLogger(__name__)


def rotary_table(
    length: int,
    rotary_dim: int,
    theta: float,
    device: torch.device,
    yarn: Yarn | None = None,
    whole_dim: int | None = None,
) -> torch.Tensor:
    """cos + i sin of every position and frequency, complex64 [length, rotary_dim / 2] (RoFormer, section 3.4).

    `whole_dim`: the frequencies are the first ones of so many dimensions (Gemma 4's "proportional" rotation).
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / (whole_dim or rotary_dim)
    frequencies = theta**-exponents
    if yarn:
        frequencies = stretched(frequencies, rotary_dim, theta, yarn)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.polar(torch.full_like(angles, yarn.magnitude if yarn else 1.0), angles).to(device)


def stretched(frequencies: torch.Tensor, rotary_dim: int, theta: float, yarn: Yarn) -> torch.Tensor:
    """YaRN: frequencies that turn often within the original length stay, slow ones are divided by the factor, and those
    between are mixed; [rotary_dim / 2].
    """

    def dimension(turns: float) -> float:
        """Of the frequency that turns so often within the original length."""
        return rotary_dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), rotary_dim - 1)
    place = torch.arange(rotary_dim // 2, dtype=torch.float32)
    slow = ((place - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies * (1 - slow) + frequencies / yarn.factor * slow


def query_scales(length: int, scale: QueryScale, device: torch.device) -> torch.Tensor:
    """What the queries of each position are multiplied by, float32 [length]."""
    places = torch.arange(length, device=device)
    return 1.0 + scale.beta * torch.log1p(torch.div(places, scale.length, rounding_mode="floor").float())


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate the first rotary_dim of x [tokens, …, head_dim], whose pairs lie side by side, in float32.

    `turns` are [tokens, rotary_dim / 2].
    """
    rotary_dim = 2 * turns.shape[1]
    if rotary_dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :rotary_dim], turns), x[..., rotary_dim:]], -1)
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turns = turns.view(turns.shape[0], *(1,) * (x.dim() - 2), turns.shape[1])
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm, cast to the model's type before the weight is applied, as LLaDA does."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    length: torch.Tensor = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True
    )  # one pass over x where the library makes three
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)


def add_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and its RMS norm; all [tokens, hidden]."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def place(
    fused: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q: int,
    kv: int,
) -> torch.Tensor:
    """Rotated queries [tokens, groups · q, head_dim]; rotated keys, and values, go to the pool tokens `slots`.

    `fused` is [tokens, groups, q + 2 kv, head_dim].
    """
    tokens, _, _, head_dim = fused.shape
    turned = rotate(fused[:, :, : q + kv], turns)
    keys.index_copy_(0, slots, turned[:, :, q:].reshape(tokens, -1, head_dim))
    values.index_copy_(0, slots, fused[:, :, q + kv :].reshape(tokens, -1, head_dim))
    return turned[:, :, :q].reshape(tokens, -1, head_dim)


def gated(fused: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [tokens, groups · width], of [tokens, groups, 2, width]."""
    gate, up = fused.unbind(2)
    return F.silu(gate).mul_(up).flatten(1)


PLAIN = Kernels(add_norm, place, gated, None)


def kernels_for(device: torch.device) -> Kernels:
    """The kernels where they can run, else plain torch."""
    if not has_kernels(device):
        return PLAIN
    from dilaserve.models import kernels

    return kernels.KERNELS


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there, which takes a GPU, Triton, and a C compiler for its launchers; tries one."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from dilaserve.models import kernels

    try:
        kernels.gated(torch.ones(1, 1, 2, 16, dtype=torch.bfloat16, device=device))
    except Exception as error:  # whatever is missing, steps go on without
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.warning("Triton's kernels do not run on %s (%s); steps will be slower", device, reason)
        return False
    return True


def interleaved(weight: torch.Tensor, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Rows of a q or k projection, its bias or norm, reordered from NeoX halves to neighbouring pairs, which `rotate`
    wants; of each head the first `rotary_dim`.

    Attention scores do not change: q and k are reordered alike.
    """
    heads = weight.view(-1, head_dim, *weight.shape[1:])
    first, second = heads[:, :rotary_dim].chunk(2, dim=1)
    pairs = torch.stack([first, second], 2).flatten(1, 2)
    return torch.cat([pairs, heads[:, rotary_dim:]], 1).view(weight.shape)
