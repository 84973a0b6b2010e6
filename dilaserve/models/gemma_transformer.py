"""The forward pass of DiffusionGemma: finished text and open blocks of noise go through the same layers together.

Source: transformers 5.23, models/diffusion_gemma, whose encoder computes finished text and whose decoder an open block.
They share all weights but a factor behind each layer. An open block's K/V are overwritten once it is finished.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dilaserve.models.attention import attend
from dilaserve.models.blocks import place, rotary_table
from dilaserve.models.experts import ROUTERS, routed
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import NoisyTokens, Packed
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.transformer import Model, alone
from dilaserve.models.weights import Weights


def norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMS norm in float32, cast to the type of x after the weight is applied."""
    wide = x.float()
    normed = wide * torch.pow(wide.square().mean(-1, keepdim=True) + eps, -0.5)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def gated(fused: torch.Tensor) -> torch.Tensor:
    """gelu(gate) · up, [tokens, groups · width], of [tokens, groups, 2, width]."""
    gate, up = fused.unbind(2)
    return (F.gelu(gate, approximate="tanh") * up).flatten(1)


class GemmaModel(Model):
    """See `transformer.Model`. Its rotary table has the angles of windowed layers first, then those of full ones."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        shard: Shard = Shard(),  # noqa: B008 - a frozen value
        reduce: Callable[[torch.Tensor], torch.Tensor] = alone,
        turns: torch.Tensor | None = None,
    ) -> None:
        assert weights.gemma is not None
        super().__init__(spec, weights, shard, reduce, rotary(spec, weights.norm.device) if turns is None else turns)
        self.parts = weights.gemma
        self.embed_scale = torch.tensor(spec.hidden**0.5).to(weights.norm.dtype).item()

    def hidden(self, packed: Packed, pool: KVPool) -> torch.Tensor:
        """Final hidden states of the kept tokens, [kept, hidden], normalised; writes K/V of all tokens to the pool."""
        eps, kept, last = self.spec.norm_eps, packed.kept, len(self.blocks) - 1
        turns = torch.split(self.turns[packed.positions], [self.spec.rotary_dim // 2, self.full_rotary // 2], 1)
        x, noisy = self.embedded(packed.ids, packed.noisy)
        for i, (block, layer) in enumerate(zip(self.blocks, self.parts.layers, strict=True)):
            h = norm(x, block.attn_norm, eps)
            q, groups = self.queries(i, h, turns[self.spec.is_full(i)], packed.slots, pool), packed.groups
            if packed.windows is not None and not self.spec.is_full(i):
                groups = packed.windows
            if i == last and kept is not None:
                if not len(kept):
                    return x[:0]  # K/V were all that was wanted
                x, q, noisy, groups = x[kept], q[kept], noisy[kept], packed.kept_groups
            mixed = self.reduce(F.linear(attend(q, pool, i, groups).flatten(1), block.attn_out))
            x = x + norm(mixed, layer.attended, eps)
            x = (x + self.fed(i, x)) * torch.where(noisy, layer.noisy, layer.finished)
        return norm(x, self.weights.norm, eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] → float32 [n, the rank's part of the vocabulary], capped."""
        logits = F.linear(hidden, self.head).float()
        cap = self.spec.softcap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    def expected_embedding(self, chances: torch.Tensor) -> torch.Tensor:
        """What a block's next step is told: the mean embedding under chances of the rank's part of the vocabulary.

        float32 [n, part] → [n, hidden].
        """
        mine = self.weights.embedding[self.vocabulary]
        return self.reduce(chances.to(mine.dtype) @ mine) * self.embed_scale

    @property
    def full_rotary(self) -> int:
        return self.spec.full.rotary if self.spec.full else 0

    def embedded(self, ids: torch.Tensor, noisy: NoisyTokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers' input, [tokens, hidden], and which of the tokens are of open blocks, bool [tokens, 1]."""
        x = F.embedding(ids, self.weights.embedding) * self.embed_scale
        open_tokens = torch.zeros(len(ids), 1, dtype=torch.bool, device=x.device)
        if noisy is None or not len(noisy.places):
            return x, open_tokens
        told = self.told(noisy.expected.to(x.dtype))
        x[noisy.places] = norm(x[noisy.places] + told, None, self.spec.norm_eps)
        return x, open_tokens.index_fill_(0, noisy.places, True)

    def told(self, expected: torch.Tensor) -> torch.Tensor:
        """Self-conditioning: what the embedding that the last step expected adds to that of a token; [n, hidden]."""
        weights = self.parts
        x = norm(expected, weights.before, self.spec.norm_eps)
        return F.linear(gated(F.linear(x, weights.gate_up).view(len(x), 1, 2, -1)), weights.down)

    def queries(self, i: int, h: torch.Tensor, turns: torch.Tensor, slots: torch.Tensor, pool: KVPool) -> torch.Tensor:
        """Rotated queries of layer i, [tokens, heads, head_dim]; K and V go to the pool tokens `slots`."""
        block, (kv_heads, head_dim) = self.blocks[i], self.spec.kv_shape(i)
        q, kv, eps = self.spec.heads // self.spec.groups, kv_heads // self.spec.groups, self.spec.norm_eps
        fused = F.linear(h, block.qkv).view(len(h), self.groups, q + 2 * kv, head_dim)
        for part, weight in zip(torch.split(fused, [q, kv, kv], 2), (block.q_norm, block.k_norm, None), strict=True):
            part.copy_(norm(part, weight, eps))
        return place(fused, turns, slots, pool.keys[i], pool.values[i], q, kv)

    def fed(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The MLP and the experts beside each other, normed, [tokens, hidden]."""
        block, layer, eps, experts = self.blocks[i], self.parts.layers[i], self.spec.norm_eps, self.spec.experts
        assert experts is not None
        assert block.experts is not None
        dense = norm(x, block.ff_norm, eps)
        gate_up = F.linear(dense, block.gate_up).view(len(x), self.groups, 2, -1)
        scored = norm(x, None, eps) * layer.router_scale * self.spec.hidden**-0.5
        routing = ROUTERS[experts.router](scored, block.experts, experts)
        first, sent = self.shard.slice(experts.count).start, norm(x, layer.before_experts, eps)
        mixed = routed(sent, routing, block.experts, experts, first, gated, self.multiply)
        dense, mixed = self.reduce(torch.stack((F.linear(gated(gate_up), block.down), mixed)))
        return norm(norm(dense, layer.fed, eps) + norm(mixed, layer.mixed, eps), layer.summed, eps)


def rotary(spec: ModelSpec, device: torch.device) -> torch.Tensor:
    """Angles of both kinds of layers side by side, complex64 [length, frequencies]."""
    table = rotary_table(spec.max_length, spec.rotary_dim, spec.rope_theta, device)
    if spec.full is None:
        return table
    full = rotary_table(spec.max_length, spec.full.rotary, spec.full.rope_theta, device, whole_dim=spec.full.head_dim)
    return torch.cat([table, full], 1)
