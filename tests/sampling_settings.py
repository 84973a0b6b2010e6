"""Sampling settings of masked positions; a test names the ones that it is about."""

import torch

from dilaserve.worker.sampler import Sampling

TYPES = {"temperature": torch.float32, "top_p": torch.float32, "top_k": torch.int32, "min_p": torch.float32}
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "step": 0, "position": 0}


def sampling(masks: int, never: torch.Tensor | None = None, **settings) -> Sampling:
    """The settings of `masks` positions; a single value holds for all."""
    each = {
        name: torch.as_tensor(settings.get(name, default)).to(TYPES.get(name, torch.int64)).expand(masks)
        for name, default in DEFAULTS.items()
    }
    never = torch.zeros(masks, 0, dtype=torch.int64) if never is None else never
    return Sampling(**each, never=never, given=torch.full((masks,), -1))
