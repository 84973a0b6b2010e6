"""The best token of each row of logits, and how sure the model is of it: one sweep, by a kernel where there is one.

`plain` defines the result; the kernel of a GPU must give the same.
"""

from collections.abc import Callable

import torch

from dilaserve.models.blocks import has_kernels
from dilaserve.worker.candidates import HOPELESS, Candidates

Best = Callable[[torch.Tensor, int], Candidates]


def best(logits: torch.Tensor, mask_id: int) -> Candidates:
    """`plain`, by the fastest way there is for where the logits lie."""
    return sweep_for(logits.device)(logits, mask_id)


def sweep_for(device: torch.device) -> Best:
    if not has_kernels(device):
        return plain
    from dilaserve.worker import kernels

    return kernels.best


def plain(logits: torch.Tensor, mask_id: int) -> Candidates:
    """The best token of each row of logits [rows, vocab]; the mask token is never chosen but counts in the odds.

    The first of equal logits wins, as in torch.argmax. A row with a NaN, with two infinities or with nothing above
    -inf is `HOPELESS`, and its token any but the mask. `logits` is overwritten.
    """
    logits = logits.float()
    mask_logit = logits[:, mask_id].clone()
    logits[:, mask_id] = -torch.inf
    return weighed(logits, logits.argmax(1, keepdim=True), mask_logit)


def weighed(logits: torch.Tensor, token: torch.Tensor, mask_logit: torch.Tensor) -> Candidates:
    """The odds of the tokens [rows, 1] against all others and against the mask; `logits` is overwritten."""
    chosen = logits.gather(1, token)
    weights = logits.sub_(chosen).exp_().scatter_(1, token, 0.0)
    odds = weights.sum(1) + (mask_logit - chosen.squeeze(1)).exp_()
    return Candidates(token.squeeze(1), odds.nan_to_num_(nan=HOPELESS, posinf=HOPELESS))
