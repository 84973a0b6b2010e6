"""Mixture-of-experts layers: which experts each token is sent to, and the sum of what those compute.

1. A router chooses experts and their weights for each token (`ROUTERS`); all ranks of a TP group choose alike.
2. Copies of the tokens are sorted by expert. Experts of other ranks come last, and are left to those.
3. The experts' gated MLPs run: in grouped matrix products where the device has them, else one expert after the other.
4. The results go back to their tokens, and are weighted and summed in ascending order of the experts.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dilaserve.models.spec import Experts

LEAST_SUM = 1e-20  # added to a sum of sigmoids before it divides, as LLaDA2 does
BEST_OF_GROUP = 2  # experts whose scores tell how good their group is
ALIGNED = 8  # elements of 16 bytes; grouped products take rows that are multiples


class ExpertWeights(NamedTuple):
    """Router and experts of one layer, or of one shard of its experts."""

    router: torch.Tensor  # [experts, hidden], of all ranks
    gate_up: torch.Tensor  # [experts / size, 2 · width, hidden]
    down: torch.Tensor  # [experts / size, hidden, width]
    bias: torch.Tensor | None = None  # float32 [experts], of all ranks
    scale: torch.Tensor | None = None  # [experts], of all ranks; factors of their weights


class Routing(NamedTuple):
    """The experts of each token and their weights; [tokens, chosen], weights in float32."""

    weights: torch.Tensor
    experts: torch.Tensor


class SortedRows(NamedTuple):
    """One row for each choice of a token, sorted by expert; those of other ranks' experts come last."""

    order: torch.Tensor  # [tokens · chosen], the choice that each row belongs to
    ends: torch.Tensor  # int32 [experts of this rank], the end of each one's rows
    mine: torch.Tensor  # [tokens, chosen], whether the choice is an expert of this rank


Gated = Callable[[torch.Tensor], torch.Tensor]
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Router = Callable[[torch.Tensor, ExpertWeights, Experts], Routing]


def feed_forward(
    x: torch.Tensor, weights: ExpertWeights, spec: Experts, first: int, gated: Gated, multiply: Multiply | None
) -> torch.Tensor:
    """The weighted sum of each token's experts, [tokens, hidden]; of those that this rank holds, from `first` on.

    `multiply` is what `grouped_for` gives. With it, nothing waits for the device.
    """
    return routed(x, ROUTERS[spec.router](x, weights, spec), weights, spec, first, gated, multiply)


def routed(
    x: torch.Tensor,
    routing: Routing,
    weights: ExpertWeights,
    spec: Experts,
    first: int,
    gated: Gated,
    multiply: Multiply | None,
) -> torch.Tensor:
    """The same for a choice of experts that was made from something else than `x`."""
    routing = ascending(routing)
    rows = sorted_rows(routing.experts, spec.count, first, len(weights.down))
    if multiply is None:
        return each_expert(x, rows, routing.weights, weights, spec, gated)
    fed = grouped(x[rows.order // spec.chosen], rows.ends, weights, gated, multiply)
    return summed(fed, rows, routing.weights, spec, whole=len(weights.down) == spec.count)


def softmax_router(x: torch.Tensor, weights: ExpertWeights, spec: Experts) -> Routing:
    """The largest of a softmax over all experts, in float32 of logits in the model's type (OLMoE, LLaDA-MoE)."""
    odds = F.linear(x, weights.router).softmax(-1, dtype=torch.float32)
    if weights.bias is not None:
        odds = odds + weights.bias
    return Routing(*odds.topk(spec.chosen))


def renormalised_router(x: torch.Tensor, weights: ExpertWeights, spec: Experts) -> Routing:
    """The same, divided by their sum (Qwen3-MoE with `norm_topk_prob`)."""
    odds, experts = softmax_router(x, weights, spec)
    return Routing(odds / odds.sum(-1, keepdim=True), experts)


def scaled_router(x: torch.Tensor, weights: ExpertWeights, spec: Experts) -> Routing:
    """The same, times a factor of each expert (Gemma 4)."""
    odds, experts = renormalised_router(x, weights, spec)
    assert weights.scale is not None
    return Routing(odds * weights.scale[experts], experts)


def sigmoid_router(x: torch.Tensor, weights: ExpertWeights, spec: Experts) -> Routing:
    """The best experts of the best groups by sigmoid plus bias, weighted by the sigmoid (DeepSeek-V3, LLaDA2)."""
    scores = F.linear(x.float(), weights.router.float()).sigmoid()
    ranked = scores if weights.bias is None else scores + weights.bias
    groups = ranked.view(len(x), spec.groups, -1)
    best = groups.topk(min(BEST_OF_GROUP, groups.shape[-1])).values.sum(-1).topk(spec.kept_groups).indices
    left_out = torch.ones(groups.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, False)
    experts = groups.masked_fill(left_out[..., None], -torch.inf).flatten(1).topk(spec.chosen).indices
    odds = scores.gather(1, experts)
    if spec.chosen > 1:
        odds = odds / (odds.sum(-1, keepdim=True) + LEAST_SUM)
    return Routing(odds * spec.scale, experts)


ROUTERS: dict[str, Router] = {
    "softmax": softmax_router,
    "softmax-renormalised": renormalised_router,
    "softmax-scaled": scaled_router,
    "sigmoid-groups": sigmoid_router,
}


def ascending(routing: Routing) -> Routing:
    """The same with each token's experts in ascending order, in which their results are summed."""
    experts, order = routing.experts.sort(dim=1)
    return Routing(routing.weights.gather(1, order), experts)


def sorted_rows(experts: torch.Tensor, count: int, first: int, held: int) -> SortedRows:
    """The rows of a rank that holds `held` of `count` experts from `first` on."""
    local = (experts - first) % count
    keys, order = local.flatten().sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(1, held + 1, device=keys.device), out_int32=True)
    return SortedRows(order, ends, local < held)


def each_expert(
    x: torch.Tensor,
    rows: SortedRows,
    odds: torch.Tensor,
    weights: ExpertWeights,
    spec: Experts,
    gated: Gated,
) -> torch.Tensor:
    """One expert after the other, each added to its tokens; it defines the result. `odds` weigh the choices."""
    total = torch.zeros_like(x, dtype=torch.float32 if spec.float32_sum else x.dtype)
    tokens, factors = rows.order // spec.chosen, odds.flatten()[rows.order, None].to(total.dtype)
    for expert, (start, end) in enumerate(pairwise([0, *rows.ends.tolist()])):
        if start < end:
            mine = tokens[start:end]
            fused = F.linear(x[mine], weights.gate_up[expert])
            fed = F.linear(gated(fused.view(end - start, 1, 2, -1)), weights.down[expert])
            total.index_add_(0, mine, fed * factors[start:end])
    return total.to(x.dtype)


def grouped(
    rows: torch.Tensor, ends: torch.Tensor, weights: ExpertWeights, gated: Gated, multiply: Multiply
) -> torch.Tensor:
    """What the experts compute for each row, [rows, hidden], in two grouped matrix products; undefined after the last
    end.
    """
    fused = multiply(rows, weights.gate_up.transpose(1, 2), ends)
    return multiply(gated(fused.view(len(rows), 1, 2, fused.shape[1] // 2)), weights.down.transpose(1, 2), ends)


def summed(fed: torch.Tensor, rows: SortedRows, odds: torch.Tensor, spec: Experts, whole: bool) -> torch.Tensor:
    """Weigh and sum what the experts computed for each token, [tokens, hidden]; not `whole`: some are other ranks'."""
    back = torch.empty_like(fed).index_copy_(0, rows.order, fed)
    back = back.view(*odds.shape, fed.shape[1])  # [tokens, chosen, hidden]
    if not whole:
        back = back.masked_fill(~rows.mine[..., None], 0.0)
    if spec.float32_sum:
        return (back.float() * odds[..., None]).sum(1).to(fed.dtype)
    parts = (back * odds[..., None].to(fed.dtype)).unbind(1)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def grouped_for(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> Multiply | None:
    """Grouped matrix products that never wait for the device, or None where it or the installed torch has none.

    torch has kernels for bfloat16 on GPUs of compute capability 9 and 10. Elsewhere its function is a loop that reads
    the ends of the groups on the host, which `each_expert` does as well.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or hidden % ALIGNED or width % ALIGNED:
        return None
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return None
    return multiplier()


@functools.cache
def multiplier() -> Multiply | None:
    """torch.nn.functional.grouped_mm, or what older versions of torch call it."""
    call: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if call is None:
        return None

    def multiply(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = call(rows, matrices, offs=ends)
        return out

    return multiply
