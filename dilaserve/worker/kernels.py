"""The row statistics as a Triton kernel: every logit is read once and nothing of the vocabulary's width is written."""

import torch
import triton
import triton.language as tl

from dilaserve.worker.statistics import HOPELESS, Guess

MOST = 8192  # logits that a program looks at together


def best(logits: torch.Tensor, mask_id: int) -> Guess:
    """See `statistics.plain`; here `logits` stay as they are."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    odds = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(MOST, triton.next_power_of_2(vocab))
        sweep[(rows,)](logits, token, odds, logits.stride(0), mask_id, HOPELESS, vocab, block, num_warps=8)
    return Guess(token, odds)


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
