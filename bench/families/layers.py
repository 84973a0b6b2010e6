"""The layers of all families in plain torch, for one prompt, with K/V concatenated as transformers' DynamicCache does.

What a user runs without a server. The sizes are the spec's; nothing else is shared with the engine.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dilaserve import models
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.spec import Experts, ModelSpec, Yarn

KV = list[tuple[torch.Tensor, torch.Tensor]]  # by layer: keys after their rotation and values, [kv heads, tokens, size]


class Plain:
    """One checkpoint in float32."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint(directory)
        self.spec, self.names = models.describe(checkpoint), models.FAMILIES[checkpoint.architecture].names
        self.mask_id = self.spec.mask_id
        self.w = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
        self.cos, self.sin = rotary(self.spec)
        self.scale = None
        if self.spec.query_scale:
            far = torch.arange(self.spec.max_length) // self.spec.query_scale.length
            self.scale = (1 + self.spec.query_scale.beta * torch.log(1 + far))[:, None]

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, start: int = 0, past: KV | None = None, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, KV]:
        """Logits [tokens, vocab] of ids [tokens] from position `start` on, and the K/V of all that they saw.

        The ids' K/V replace those of `past` at their positions, or are put behind them. `visible` [tokens, keys] is
        true where a query sees a key; None: everywhere.
        """
        x, kept, names = F.embedding(ids, self.w[f"{self.names.embedding}.weight"]), [], self.names
        for i in range(self.spec.layers):
            layer = names.layer.format(i)
            q, k, v = self.projected(self.norm(x, layer + names.attn_norm), layer, start)
            if past is not None:
                k, v = (
                    torch.cat((old[:, :start], new, old[:, start + len(ids) :]), 1)
                    for old, new in zip(past[i], (k, v), strict=True)
                )
            kept.append((k, v))
            gqa = self.spec.heads != self.spec.kv_heads
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, enable_gqa=gqa)[0]
            x = x + self.linear(mixed.transpose(0, 1).flatten(1), layer + names.out)
            x = x + self.feed_forward(self.norm(x, layer + names.ff_norm), layer, i)
        head = names.embedding if self.spec.tied else names.head
        return self.linear(self.norm(x, names.norm), head), kept

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.spec.norm_eps)

    def projected(self, h: torch.Tensor, layer: str, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, [heads, tokens, head_dim]."""
        spec, names, size = self.spec, self.names, self.spec.head_dim
        if names.qkv is None:
            parts = tuple(self.linear(h, layer + name) for name in (names.q, names.k, names.v))
        else:
            rows = [heads * size for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
            parts = self.linear(h, layer + names.qkv).split(rows, -1)
        q, k, v = (part.view(len(h), -1, size).transpose(0, 1) for part in parts)
        if spec.qk_norm:
            q, k = self.norm(q, layer + names.q_norm), self.norm(k, layer + names.k_norm)
        q, k = self.turned(q, start), self.turned(k, start)
        return q if self.scale is None else q * self.scale[start : start + len(h)], k, v

    def turned(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """NeoX halves of the first rotated dimensions."""
        cos, sin = self.cos[start : start + x.shape[1]], self.sin[start : start + x.shape[1]]
        head, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
        first, second = head.chunk(2, -1)
        head = head * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((head, rest), -1) if rest.shape[-1] else head

    def feed_forward(self, h: torch.Tensor, layer: str, i: int) -> torch.Tensor:
        experts, names = self.spec.experts_of(i), self.names
        if experts is None:
            return self.mlp(h, layer + names.gate, layer + names.up, layer + names.down)
        mixed = self.mixture(h, layer, experts)
        return mixed + self.expert(h, layer + names.shared) if experts.shared else mixed

    def mlp(self, h: torch.Tensor, gate: str, up: str, down: str) -> torch.Tensor:
        return self.linear(F.silu(self.linear(h, gate)) * self.linear(h, up), down)

    def expert(self, h: torch.Tensor, name: str) -> torch.Tensor:
        return self.mlp(h, name + "gate_proj", name + "up_proj", name + "down_proj")

    def mixture(self, h: torch.Tensor, layer: str, experts: Experts) -> torch.Tensor:
        """One expert that some token has chosen after the other, as transformers' Qwen3-MoE does."""
        bias = self.w.get(layer + self.names.expert_bias)
        odds, chosen = routed(self.linear(h, layer + self.names.router), bias, experts)
        total = torch.zeros_like(h)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            fed = self.expert(h[token], layer + self.names.expert.format(expert))
            total.index_add_(0, token, fed * odds[token, place, None])
        return total


def routed(logits: torch.Tensor, bias: torch.Tensor | None, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of each token's experts, [tokens, chosen]."""
    if experts.router != "sigmoid-groups":
        odds, chosen = logits.softmax(-1).topk(experts.chosen)
        return (odds / odds.sum(-1, keepdim=True) if experts.router == "softmax-renormalised" else odds), chosen
    scores = logits.sigmoid()
    groups = (scores if bias is None else scores + bias).view(len(scores), experts.groups, -1)
    best = groups.topk(2).values.sum(-1).topk(experts.kept_groups).indices
    open_groups = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    chosen = groups.masked_fill(~open_groups[..., None], -torch.inf).flatten(1).topk(experts.chosen).indices
    odds = scores.gather(1, chosen)
    return odds / (odds.sum(-1, keepdim=True) + 1e-20) * experts.scale, chosen


def rotary(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all positions, [max_length, rotary_dim]."""
    frequencies = spec.rope_theta ** (-torch.arange(0, spec.rotary_dim, 2) / spec.rotary_dim)
    if spec.yarn:
        frequencies = stretched(frequencies, spec.rope_theta, spec.yarn)
    angles = torch.outer(torch.arange(spec.max_length), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def stretched(frequencies: torch.Tensor, theta: float, yarn: Yarn) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3) with an attention factor of 1."""
    size = 2 * len(frequencies)
    low, high = (
        size * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    ramp = ((torch.arange(size // 2) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / yarn.factor * ramp
