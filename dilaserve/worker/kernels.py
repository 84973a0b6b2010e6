"""What is done around the forward pass, as Triton kernels: laying rows out, judging their logits, unmasking.

Every logit is read once and nothing of the vocabulary's width is written.
"""

import torch
import triton
import triton.language as tl

from dilaserve.worker.candidates import HOPELESS, Candidates
from dilaserve.worker.step_buffers import DEPTH, WIDTH, Buffers, Laid, StepKernels

MOST = 8192  # logits that a program looks at together


def best(logits: torch.Tensor, mask_id: int) -> Candidates:
    """See `confidence.plain`; here `logits` stay as they are."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    odds = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(MOST, triton.next_power_of_2(vocab))
        sweep[(rows,)](logits, token, odds, logits.stride(0), mask_id, HOPELESS, vocab, block, num_warps=8)
    return Candidates(token, odds)


def lay_out(buffers: Buffers, rows: int, spare: int) -> Laid:
    """See `step_kernels.lay_out`."""
    batch, device = buffers.batch, buffers.batch.device
    ids, positions, slots = (torch.empty(rows * WIDTH, dtype=torch.int64, device=device) for _ in range(3))
    starts, keys = (torch.empty(size, dtype=torch.int32, device=device) for size in (rows + 1, rows))
    lay_out_row[(rows,)](
        batch, buffers.turn, ids, positions, slots, starts, keys, batch.stride(0), spare, WIDTH, DEPTH, num_warps=1
    )
    return Laid(ids, positions, slots, starts, keys)


def unmask(buffers: Buffers, rows: int, mask_id: int, candidates: Candidates) -> None:
    """See `step_kernels.unmask`."""
    batch, found = buffers.batch, buffers.found
    reals, bits = batch.view(torch.float64), found.view(torch.float32)
    sizes = batch.stride(0), found.stride(0), found.stride(1)
    unmask_row[(rows,)](
        batch, reals, found, bits, buffers.turn, candidates.token, candidates.odds, *sizes, mask_id, WIDTH, num_warps=1
    )


STEP_KERNELS = StepKernels(lay_out, unmask)


@triton.jit  # type: ignore[untyped-decorator]
def lay_out_row(  # type: ignore[no-untyped-def]
    batch, turn, ids, positions, slots, starts, keys, stride, spare, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):
    """One row, its fields as `FIELDS` has them; the first program takes the turn, the last one ends `starts`."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    fields = batch + row * stride + WIDTH
    kv_start, start, length = tl.load(fields), tl.load(fields + 2), tl.load(fields + 3)
    valid = column < length
    position = tl.where(valid, start + column, column)
    here = row * WIDTH + column
    tl.store(ids + here, tl.load(batch + row * stride + column))
    tl.store(positions + here, position)
    tl.store(slots + here, tl.where(valid, kv_start + position, spare + column))
    tl.store(starts + row, kv_start.to(tl.int32))
    tl.store(keys + row, tl.load(fields + 1).to(tl.int32))
    if row == 0:
        tl.store(turn, (tl.load(turn) + 1) % DEPTH)
    if row == tl.num_programs(0) - 1:
        tl.store(starts + row + 1, 0)


@triton.jit  # type: ignore[untyped-decorator]
def unmask_row(  # type: ignore[no-untyped-def]
    batch, reals, found, bits, turn, token, odds, stride, turn_stride, row_stride, mask_id, WIDTH: tl.constexpr
):
    """One row. A position's rank is how many are surer, or as sure and further left: nothing needs to be sorted."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    canvas, fields = batch + row * stride + column, row * stride + WIDTH
    first, end, shift = tl.load(batch + fields + 4), tl.load(batch + fields + 5), tl.load(batch + fields + 6)
    rule, quota = tl.load(batch + fields + 7), tl.load(batch + fields + 8)
    threshold, factor = tl.load(reals + fields + 9), tl.load(reals + fields + 10)
    old = tl.load(canvas)
    masked = (old == mask_id) & (column >= first) & (column < end)
    source = row * WIDTH + tl.maximum(column - shift, 0)
    doubt = tl.where(masked, tl.load(odds + source), float("inf"))
    surer = (doubt[None, :] < doubt[:, None]) | (
        (doubt[None, :] == doubt[:, None]) & (column[None, :] < column[:, None])
    )
    rank = tl.sum(surer.to(tl.int64), axis=1)
    confidence = 1.0 / (1.0 + doubt.to(tl.float64))
    masks = tl.sum(masked.to(tl.int64), axis=0)
    above = tl.sum((confidence >= threshold).to(tl.int64), axis=0)
    failed = ((confidence < 1.0 - factor / (rank + 2).to(tl.float64)) & (rank > 0)) | (rank >= masks)
    passed = tl.min(tl.where(failed, rank, WIDTH), axis=0)
    passed = tl.where(passed == masks - 1, masks, passed)
    dynamic = tl.maximum(above, quota)
    count = tl.where(rule == 0, above, tl.where(rule == 1, quota, tl.where(rule == 3, dynamic, passed)))  # table.RULES
    chosen = rank < tl.minimum(tl.maximum(count, 1), masks)
    new = tl.load(token + source)
    tl.store(canvas, tl.where(chosen, new, old))
    out = tl.load(turn) * turn_stride + row * row_stride + column
    tl.store(found + out, tl.where(chosen, new, -1).to(tl.int32))
    tl.store(bits + out + WIDTH, confidence.to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def sweep(logits, token, odds, stride, mask_id, hopeless, VOCAB: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row. `others` is Σ exp(l - top) over all but the best so far: with the best in it, it could not be small."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    mask_logit = tl.load(base + mask_id).to(tl.float32)
    top = -float("inf")
    where = tl.where(mask_id == 0, 1, 0)
    others = 0.0
    broken = tl.where(mask_logit != mask_logit, 1, 0)
    for first in range(0, VOCAB, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < VOCAB, other=-float("inf")).to(tl.float32)
        x = tl.where(column == mask_id, -float("inf"), x)
        broken = tl.maximum(broken, tl.max((x != x).to(tl.int32), axis=0))
        x = tl.where(x != x, float("inf"), x)
        here, at = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
        weights = tl.where(x == -float("inf"), 0.0, tl.exp(x - here))
        rest = tl.sum(tl.where(column == first + at, 0.0, weights), axis=0)
        new = tl.maximum(top, here)
        old_share = tl.where(top == -float("inf"), 0.0, tl.exp(top - new))
        new_share = tl.where(here == -float("inf"), 0.0, tl.exp(here - new))
        wins = here > top
        others = tl.where(wins, (others + 1.0) * old_share + rest, others + (rest + 1.0) * new_share)
        where = tl.where(wins, first + at, where)
        top = new
    total = others + tl.exp(mask_logit - top)
    lost = (broken > 0) | (total != total) | (total > hopeless) | (top == -float("inf"))
    tl.store(token + row, where.to(tl.int64))
    tl.store(odds + row, tl.where(lost, hopeless, total))
