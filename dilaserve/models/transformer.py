"""The transformer that all families share so far, over packed spans: pre-norm layers, rotary attention, a gated MLP or
experts.

What its layers have, `ModelSpec` says.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dilaserve.models.attention import attend
from dilaserve.models.blocks import kernels_for, query_scales, rms_norm, rotary_table
from dilaserve.models.experts import feed_forward, grouped_for
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.weights import Block, Weights, shard_of


def alone(x: torch.Tensor) -> torch.Tensor:
    """The sum over a TP group of one."""
    return x


class Model:
    """The forward pass of one rank on views of the weights. `reduce` sums a tensor over the TP group.

    `vocabulary` are the token ids whose logits the rank computes. `turns` is another model's rotary table.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        shard: Shard = Shard(),  # noqa: B008 - a frozen value
        reduce: Callable[[torch.Tensor], torch.Tensor] = alone,
        turns: torch.Tensor | None = None,
    ) -> None:
        self.spec, self.weights, self.shard, self.reduce = spec, weights, shard, reduce
        self.blocks = [shard_of(block, shard.part(weights.held)) for block in weights.blocks]
        self.groups = spec.groups // shard.size
        self.q, self.kv = spec.heads // spec.groups, spec.kv_heads // spec.groups
        self.vocabulary = shard.slice(spec.vocab_size)
        first = weights.held.slice(spec.vocab_size).start
        self.head = weights.head[self.vocabulary.start - first : self.vocabulary.stop - first]
        device = weights.norm.device
        self.kernels, self.multiply = kernels_for(device), None
        if spec.experts is not None:
            self.multiply = grouped_for(device, weights.norm.dtype, spec.hidden, spec.experts.width)
        if turns is None:
            turns = rotary_table(spec.max_length, spec.rotary_dim, spec.rope_theta, device, spec.yarn)
        self.turns = turns
        self.scales = None
        if spec.query_scale:
            self.scales = query_scales(spec.max_length, spec.query_scale, device).to(weights.norm.dtype)

    @property
    def waits(self) -> bool:
        """Whether steps wait for the device to say how many tokens each expert got; then no graph can record them."""
        return self.spec.experts is not None and self.multiply is None

    def hidden(self, packed: Packed, pool: KVPool) -> torch.Tensor:
        """Final hidden states of the kept tokens, [kept, hidden], normalised; writes K/V of all tokens to the pool.

        The last layer computes queries and MLP for the kept tokens only: the others' K/V is all that is ever read.
        """
        kernels, eps, blocks = self.kernels, self.spec.norm_eps, self.blocks
        turns = self.turns[packed.positions]
        x = F.embedding(packed.ids, self.weights.embedding)
        h = rms_norm(x, blocks[0].attn_norm, eps)
        for i, block in enumerate(blocks):
            last = i == len(blocks) - 1
            q = kernels.place(
                self.project(block, h), turns, packed.slots, pool.keys[i], pool.values[i], self.q, self.kv
            )
            if self.scales is not None:
                q = q * self.scales[packed.positions][:, None, None]
            groups = packed.groups
            if last and packed.kept is not None and not len(packed.kept):
                return x[:0]  # K/V were all that was wanted
            if last and packed.kept is not None:
                x, q, groups = x[packed.kept], q[packed.kept], packed.kept_groups
            mixed = F.linear(attend(q, pool, i, groups, kernels).flatten(1), block.attn_out)
            x, h = kernels.add_norm(x, self.reduce(mixed), block.ff_norm, eps)
            fed = self.reduce(self.feed_forward(i, h))
            x, h = kernels.add_norm(x, fed, self.weights.norm if last else blocks[i + 1].attn_norm, eps)
        return h

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] → [n, the rank's part of the vocabulary] in the model's type, unscaled."""
        return F.linear(hidden, self.head)

    def expected_embedding(self, chances: torch.Tensor) -> torch.Tensor:
        """The mean embedding under chances of the rank's part of the vocabulary, float32 [n, part] → [n, hidden]."""
        mine = self.weights.embedding[self.vocabulary]
        return self.reduce(chances.to(mine.dtype) @ mine)

    def project(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        """q, k and v of each head group, [tokens, groups, q + 2 kv, head_dim]; q and k are not rotated yet."""
        shape = len(x), self.groups, self.q + 2 * self.kv, self.spec.head_dim
        fused = F.linear(x, block.qkv, block.qkv_bias).view(shape)
        if block.q_norm is not None and block.k_norm is not None:
            q, k = fused[:, :, : self.q], fused[:, :, self.q : self.q + self.kv]
            q.copy_(rms_norm(q, block.q_norm, self.spec.norm_eps))
            k.copy_(rms_norm(k, block.k_norm, self.spec.norm_eps))
        return fused

    def feed_forward(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The rank's part of the MLP, of the experts, or of both, of layer i."""
        block, experts = self.blocks[i], self.spec.experts_of(i)
        if experts is None or block.experts is None:
            return self.mlp(block, x)
        first = self.shard.slice(experts.count).start
        mixed = feed_forward(x, block.experts, experts, first, self.kernels.gated, self.multiply)
        return mixed + self.mlp(block, x) if experts.shared else mixed

    def mlp(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        gate_up = F.linear(x, block.gate_up).view(len(x), self.groups, 2, -1)
        return F.linear(self.kernels.gated(gate_up), block.down)
