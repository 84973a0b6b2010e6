"""A candidate for the products of a reuse step: few tokens times a weight that is read once; `parts` measures it.

A weight's rows take the place that a product of many tokens gives to tokens, so that tiles are full; where these are
fewer than processors, their sum is split.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Form(NamedTuple):
    rows: int  # of the weight, of a program
    depth: int  # of the sum, of a step of its loop
    splits: int  # of the sum
    warps: int
    stages: int


FORMS = (
    Form(32, 256, 1, 4, 4),
    Form(64, 128, 1, 4, 5),
    Form(64, 128, 2, 4, 5),
    Form(128, 64, 2, 4, 5),
    Form(128, 64, 4, 8, 5),
)


def product(x: torch.Tensor, weight: torch.Tensor, form: Form) -> torch.Tensor:
    """x @ weight.T, [tokens, n], of x [tokens, k] and weight [n, k]; k is a multiple of depth · splits."""
    (tokens, k), n = x.shape, len(weight)
    wide = max(16, triton.next_power_of_2(tokens))
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    parts = out if form.splits == 1 else torch.empty(form.splits, tokens, n, dtype=torch.float32, device=x.device)
    grid = triton.cdiv(n, form.rows), form.splits
    multiply[grid](
        x, weight, parts, tokens, n, k, k // form.splits, form.rows, form.depth, wide,
        num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip
    return out if form.splits == 1 else parts.sum(0).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(  # type: ignore[no-untyped-def]
    x, weight, out, tokens, n, k, share, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr
):
    """Some rows of the weight over one share of the sum."""
    row, token, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, DEPTH)
    first = tl.program_id(1) * share
    weights = weight + row[:, None].to(tl.int64) * k + first + depth[None, :]
    given = x + token[:, None] * k + first + depth[None, :]
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for at in range(0, share, DEPTH):
        one = tl.load(weights + at, mask=row[:, None] < n, other=0.0)
        other = tl.load(given + at, mask=token[:, None] < tokens, other=0.0)
        total += tl.dot(one, tl.trans(other), input_precision="ieee")
    place = out + (tl.program_id(1) * tokens + token[None, :]) * n + row[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row[:, None] < n) & (token[None, :] < tokens))
