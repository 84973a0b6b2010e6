"""The two ends of a step on fixed buffers, before and behind the forward pass; by a kernel each where there is one.

`lay_out` and `unmask` define the results. In plain torch they are some sixty launches for a few hundred numbers, which
beside a small step is time; the kernels of a GPU must give the same.
"""

import torch
import torch.nn.functional as F

from dilaserve.models.blocks import has_kernels
from dilaserve.worker.candidates import Candidates
from dilaserve.worker.sampler import Rules, encoded, taken
from dilaserve.worker.step_buffers import DEPTH, REALS, WIDTH, Buffers, Laid, StepKernels


def lay_out(buffers: Buffers, rows: int, spare: int) -> Laid:
    """The first `rows` rows of the batch, and the next turn. What pads a row goes to the tokens from `spare` on."""
    ids, fields = buffers.batch[:rows, :WIDTH], buffers.batch[:rows, WIDTH:]
    kv_start, keys, start, length, *_ = fields.unbind(1)
    column = torch.arange(WIDTH, device=ids.device)
    valid = column < length[:, None]
    positions = torch.where(valid, start[:, None] + column, column)
    slots = torch.where(valid, kv_start[:, None] + positions, spare + column)
    buffers.turn.add_(1).remainder_(DEPTH)
    starts = F.pad(kv_start, (0, 1)).int()
    return Laid(ids.flatten(), positions.flatten(), slots.flatten(), starts, keys.int())


def unmask(buffers: Buffers, rows: int, mask_id: int, candidates: Candidates) -> None:
    """Put what each row's rule accepts of the candidates, [rows · WIDTH], on its canvas, and say so in `found`.

    With a shift the first column has its own candidate: there is none before it, and it has no mask.
    """
    ids, fields = buffers.batch[:rows, :WIDTH], buffers.batch[:rows, WIDTH:]
    *_, first, end, shift, rule, quota = fields[:, :-REALS].unbind(1)
    threshold, factor = fields[:, -REALS:].view(torch.float64).unbind(1)
    column = torch.arange(WIDTH, device=ids.device)
    masked = (ids == mask_id) & (column >= first[:, None]) & (column < end[:, None])
    source = (column - shift[:, None]).clamp(min=0)
    token, odds = (each.view(rows, WIDTH).gather(1, source) for each in candidates)
    odds = odds.masked_fill(~masked, torch.inf)
    chosen = taken(odds, masked, Rules(rule, threshold, factor, quota))
    ids.copy_(torch.where(chosen, token, ids))
    buffers.found[:, :rows].index_copy_(0, buffers.turn, encoded(chosen, token, odds)[None])


PLAIN = StepKernels(lay_out, unmask)


def step_kernels_for(device: torch.device) -> StepKernels:
    """The kernels where they can run, else plain torch."""
    if not has_kernels(device):
        return PLAIN
    from dilaserve.worker import kernels

    return kernels.STEP_KERNELS
