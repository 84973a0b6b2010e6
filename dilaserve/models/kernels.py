"""What lies between the matrix products of a layer, as Triton kernels that round where `layers` rounds.

A reuse step reads all weights for a few tokens; many small kernels beside that would take a third of its time.
"""

import torch
import triton
import triton.language as tl

from dilaserve.models.layers import Kit

WIDE = 2048  # elements of the MLP that a program gates


def add_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layers.add_norm`; x and delta are [tokens, hidden] and contiguous."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    tokens, width = x.shape
    if tokens:
        block = triton.next_power_of_2(width)
        add_norm_rows[(tokens,)](
            x, delta, weight, total, normed, width, eps, block, num_warps=min(8, max(1, block // 512))
        )
    return total, normed


def place(
    fused: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q: int,
    kv: int,
) -> torch.Tensor:
    """See `layers.place`."""
    tokens, groups, _, head_dim = fused.shape
    out = torch.empty(tokens, groups * q, head_dim, dtype=fused.dtype, device=fused.device)
    if tokens:
        half = triton.next_power_of_2(head_dim // 2)
        place_heads[(tokens, groups)](
            fused, torch.view_as_real(turns), slots, keys, values, out, groups, q, kv, head_dim, half, num_warps=1
        )
    return out


def gated(fused: torch.Tensor) -> torch.Tensor:
    """See `layers.gated`."""
    tokens, groups, _, width = fused.shape
    out = torch.empty(tokens, groups * width, dtype=fused.dtype, device=fused.device)
    if tokens:
        gate_rows[(tokens, triton.cdiv(groups * width, WIDE))](fused, out, groups * width, width, WIDE, num_warps=4)
    return out


KIT = Kit(add_norm, place, gated)


@triton.jit  # type: ignore[untyped-decorator]
def add_norm_rows(x, delta, weight, total, normed, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token: the sum in the model's type, then its RMS norm in float32, rounded before the weight as LLaDA does."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    there = column < width
    kind = total.dtype.element_ty
    one = tl.load(x + row + column, mask=there, other=0.0).to(tl.float32)
    other = tl.load(delta + row + column, mask=there, other=0.0).to(tl.float32)
    sum_ = (one + other).to(kind)
    tl.store(total + row + column, sum_, mask=there)
    wide = sum_.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    scaled = (wide * scale).to(kind).to(tl.float32)
    by = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + row + column, (scaled * by).to(kind), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def place_heads(  # type: ignore[no-untyped-def]
    fused,
    turns,
    slots,
    keys,
    values,
    out,
    groups,
    Q: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head group of one token: q turned to `out`, k turned and v as it is to their slot of the pool."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF)
    there = pair < DIM // 2
    even = 2 * pair
    cos = tl.load(turns + token * DIM + even, mask=there, other=0.0)
    sin = tl.load(turns + token * DIM + even + 1, mask=there, other=0.0)
    slot = tl.load(slots + token)
    source = fused + (token * groups + group) * (Q + 2 * KV) * DIM
    kind = out.dtype.element_ty
    for head in tl.static_range(Q + KV):
        real = tl.load(source + head * DIM + even, mask=there, other=0.0).to(tl.float32)
        imaginary = tl.load(source + head * DIM + even + 1, mask=there, other=0.0).to(tl.float32)
        if head < Q:
            target = out + ((token * groups + group) * Q + head) * DIM
        else:
            target = keys + ((slot * groups + group) * KV + head - Q) * DIM
        tl.store(target + even, (real * cos - imaginary * sin).to(kind), mask=there)
        tl.store(target + even + 1, (real * sin + imaginary * cos).to(kind), mask=there)
    for head in tl.static_range(KV):
        first = tl.load(source + (Q + KV + head) * DIM + even, mask=there, other=0.0)
        second = tl.load(source + (Q + KV + head) * DIM + even + 1, mask=there, other=0.0)
        target = values + ((slot * groups + group) * KV + head) * DIM
        tl.store(target + even, first, mask=there)
        tl.store(target + even + 1, second, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def gate_rows(fused, out, total, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A piece of one token: silu of the gate, rounded, times up; both lie side by side in each head group."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < total
    source = fused + 2 * row * total + column // width * width + column
    kind = out.dtype.element_ty
    gate = tl.load(source, mask=there, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=there, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * total + column, (opened * up).to(kind), mask=there)
