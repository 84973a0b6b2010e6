"""What Gemma 4's layers have beyond those of other families; every device keeps all of it."""

from typing import NamedTuple

import torch


class GemmaLayer(NamedTuple):
    """One layer: norms behind attention, MLP and experts, the router's scale, and the factors of its result."""

    attended: torch.Tensor  # [hidden], the norm behind attention
    fed: torch.Tensor  # [hidden], behind the MLP
    before_experts: torch.Tensor  # [hidden]
    mixed: torch.Tensor  # [hidden], behind the experts
    summed: torch.Tensor  # [hidden], behind the sum of MLP and experts
    router_scale: torch.Tensor  # [hidden]
    finished: torch.Tensor  # [1], the factor for tokens of finished text
    noisy: torch.Tensor  # [1], the factor for tokens of an open block


class GemmaParts(NamedTuple):
    """All layers, and the MLP that tells an open block what its last step expected (self-conditioning)."""

    layers: list[GemmaLayer]
    before: torch.Tensor  # [hidden], the norm of the expected embedding
    gate_up: torch.Tensor  # [2 · mlp, hidden]
    down: torch.Tensor  # [hidden, mlp]
