"""Momentum, orthogonalised by five Newton-Schulz steps (Jordan 2024), for stacked matrices."""

import torch


class Muon:
    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 0.05)
            update = orthogonal(parameter.grad.lerp(momentum, 0.95))
            size = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - rate * decay).add_(update, alpha=-rate * size)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x
