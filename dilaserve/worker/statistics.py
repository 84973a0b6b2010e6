"""The best token of each row of logits, and how sure the model is of it: one sweep, by a kernel where there is one.

`plain` defines the result; the kernel of a GPU must give the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dilaserve.models.layers import has_kernels

HOPELESS = torch.finfo(torch.float32).max  # odds of what overflows: behind all others, yet before a row's padding


class Guess(NamedTuple):
    """The candidate of each masked position, all [masks].

    `odds` is Σ_{other} exp(l_other - l_token) = (1 - p) / p: it orders confidences that have all rounded to 1.
    """

    token: torch.Tensor  # int64
    odds: torch.Tensor  # float32

    @property
    def confidence(self) -> torch.Tensor:
        """p of the token under the unmodified softmax, in float64."""
        return 1.0 / (1.0 + self.odds.double())


Best = Callable[[torch.Tensor, int], Guess]


def best(logits: torch.Tensor, mask_id: int) -> Guess:
    """`plain`, by the fastest way there is for where the logits lie."""
    return sweep_for(logits.device)(logits, mask_id)


def sweep_for(device: torch.device) -> Best:
    if not has_kernels(device):
        return plain
    from dilaserve.worker import kernels

    return kernels.best


def plain(logits: torch.Tensor, mask_id: int) -> Guess:
    """The best token of each row of logits [rows, vocab]; the mask token is never chosen but counts in the odds.

    The first of equal logits wins, as in torch.argmax. A row with a NaN, with two infinities or with nothing above
    -inf is `HOPELESS`, and its token any but the mask. `logits` is overwritten.
    """
    logits = logits.float()
    mask_logit = logits[:, mask_id].clone()
    logits[:, mask_id] = -torch.inf
    return weighed(logits, logits.argmax(1, keepdim=True), mask_logit)


def weighed(logits: torch.Tensor, token: torch.Tensor, mask_logit: torch.Tensor) -> Guess:
    """The odds of the tokens [rows, 1] against all others and against the mask; `logits` is overwritten."""
    chosen = logits.gather(1, token)
    weights = logits.sub_(chosen).exp_().scatter_(1, token, 0.0)
    odds = weights.sum(1) + (mask_logit - chosen.squeeze(1)).exp_()
    return Guess(token.squeeze(1), odds.nan_to_num_(nan=HOPELESS, posinf=HOPELESS))
