"""The token that each masked position would take, and how sure the model is of it."""

from typing import NamedTuple

import torch

HOPELESS = torch.finfo(torch.float32).max  # odds of what overflows: behind all others, yet before a row's padding


class Candidates(NamedTuple):
    """The candidate of each masked position, all [masks].

    `odds` is Σ_{other} exp(l_other - l_token) = (1 - p) / p: it orders confidences that have all rounded to 1.
    """

    token: torch.Tensor  # int64
    odds: torch.Tensor  # float32

    @property
    def confidence(self) -> torch.Tensor:
        """p of the token under the unmodified softmax, in float64."""
        return 1.0 / (1.0 + self.odds.double())
