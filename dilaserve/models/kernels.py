"""What lies between the matrix products of a layer, as Triton kernels that round where `blocks` rounds.

A reuse step reads all weights for a few tokens; many small kernels beside that would take a third of its time.
"""

import math

import torch
import triton
import triton.language as tl

from dilaserve.models.spans import Kernels, Runs

WIDE = 2048  # elements of the MLP that a program gates
TILE = 8192  # elements of K, and of V, that a program of attention looks at together
MOST_SPLITS = 8  # of a row's keys


def add_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `blocks.add_norm`; x and delta are [tokens, hidden] and contiguous."""
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
    """See `blocks.place`."""
    tokens, groups, _, head_dim = fused.shape
    out = torch.empty(tokens, groups * q, head_dim, dtype=fused.dtype, device=fused.device)
    if tokens:
        sizes = q, kv, head_dim, 2 * turns.shape[1], triton.next_power_of_2(head_dim // 2)
        place_heads[(tokens, groups)](
            fused, torch.view_as_real(turns), slots, keys, values, out, groups, *sizes, num_warps=1
        )
    return out


def gated(fused: torch.Tensor) -> torch.Tensor:
    """See `blocks.gated`."""
    tokens, groups, _, width = fused.shape
    out = torch.empty(tokens, groups * width, dtype=fused.dtype, device=fused.device)
    if tokens:
        gate_rows[(tokens, triton.cdiv(groups * width, WIDE))](fused, out, groups * width, width, WIDE, num_warps=4)
    return out


def attend_even(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs, splits: int | None = None
) -> torch.Tensor:
    """See `attention.each_run`; the queries of a span are a power of two, and at least 16.

    Of few rows the keys are split so that all processors have some; the parts are joined by their sums (Flash-Decoding,
    Dao et al. 2023).
    """
    rows, (tokens, heads, dim) = len(runs.keys), q.shape
    splits = splits or splits_for(rows * heads, q.device)
    wide = max(16, triton.next_power_of_2(dim))
    block = min(128, TILE // wide)
    out = torch.empty_like(q)
    parts, sums = out, out  # not looked at where there is one part
    if splits > 1:
        parts = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device)
    scale = dim**-0.5 / math.log(2)
    sizes = runs.most_queries, dim, wide, block, splits
    attend_row[(rows, heads, splits)](
        q, keys, values, runs.starts, runs.keys, out, parts, sums, tokens, heads, heads // keys.shape[1], scale, *sizes,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        join_parts[(tokens, heads)](parts, sums, out, tokens * heads, dim, wide, splits, num_warps=1)
    return out


def splits_for(programs: int, device: torch.device) -> int:
    """In how many parts keys are looked at, a power of two, so that no more programs are there than processors."""
    spare = torch.cuda.get_device_properties(device).multi_processor_count // programs
    return min(MOST_SPLITS, 1 << max(0, spare.bit_length() - 1))


KERNELS = Kernels(add_norm, place, gated, attend_even)


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
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head group of one token: q turned to `out`, k turned and v as it is to their slot of the pool.

    The first TURNED of a head's DIM are turned; the turn of the others is 1.
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = 2 * tl.arange(0, HALF)[:, None] + tl.arange(0, 2)[None, :]  # pairs are moved whole
    there = place < DIM
    cos, sin = tl.split(tl.load(turns + token * TURNED + place, mask=place < TURNED, other=0.0))
    if TURNED < DIM:
        cos = tl.where(2 * tl.arange(0, HALF) < TURNED, cos, 1.0)
    slot = tl.load(slots + token)
    source = fused + (token * groups + group) * (Q + 2 * KV) * DIM
    kind = out.dtype.element_ty
    for head in tl.static_range(Q + KV):
        real, imaginary = tl.split(tl.load(source + head * DIM + place, mask=there, other=0.0).to(tl.float32))
        if head < Q:
            target = out + ((token * groups + group) * Q + head) * DIM
        else:
            target = keys + ((slot * groups + group) * KV + head - Q) * DIM
        turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
        tl.store(target + place, turned.to(kind), mask=there)
    for head in tl.static_range(KV):
        value = tl.load(source + (Q + KV + head) * DIM + place, mask=there, other=0.0)
        tl.store(values + ((slot * groups + group) * KV + head) * DIM + place, value, mask=there)


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


@triton.jit  # type: ignore[untyped-decorator]
def attend_row(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    starts,
    used,
    out,
    parts,
    sums,
    tokens,
    heads,
    shared,
    scale,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head of one row over one part of its keys; `shared` heads have one head of K and V. Powers of two."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column, dim = tl.arange(0, BLOCK), tl.arange(0, WIDE)
    token = row * QUERIES + tl.arange(0, QUERIES)
    kind = out.dtype.element_ty
    mine = (token[:, None] * heads + head) * DIM + dim[None, :]
    queries = tl.load(q + mine, mask=dim[None, :] < DIM, other=0.0)
    stride = heads // shared * DIM
    base = tl.load(starts + row).to(tl.int64) * stride + head // shared * DIM
    there = tl.load(used + row)
    part = tl.cdiv(tl.cdiv(there, BLOCK), SPLITS) * BLOCK
    first = split * part
    end = tl.minimum(first + part, there)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDE), tl.float32)
    for at in range(first, end, BLOCK):
        key = at + column
        place = base + key[:, None].to(tl.int64) * stride + dim[None, :]
        seen = (key[:, None] < end) & (dim[None, :] < DIM)
        k = tl.load(keys + place, mask=seen, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(key[None, :] < end, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        kept = tl.exp2(top - new)
        weights = tl.exp2(scores - new[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        v = tl.load(values + place, mask=seen, other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(kind), v, input_precision="ieee")
        top = new
    if SPLITS == 1:
        tl.store(out + mine, (mixed / total[:, None]).to(kind), mask=dim[None, :] < DIM)
    else:
        some = tl.where(total > 0.0, total, 1.0)
        here = split * tokens + token
        tl.store(
            parts + (here[:, None] * heads + head) * DIM + dim[None, :], mixed / some[:, None], mask=dim[None, :] < DIM
        )
        tl.store(sums + here * heads + head, top + tl.log2(some))


@triton.jit  # type: ignore[untyped-decorator]
def join_parts(parts, sums, out, rows, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One head of one token: the mean of the parts, each by its share of all weights; a part without keys has none."""
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    part, dim = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    held = tl.load(sums + part * rows + row)
    weights = tl.exp2(held - tl.max(held, axis=0))
    values = tl.load(parts + (part[:, None] * rows + row) * DIM + dim[None, :], mask=dim[None, :] < DIM, other=0.0)
    mean = tl.sum(weights[:, None] * values, axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row * DIM + dim, mean.to(out.dtype.element_ty), mask=dim < DIM)
