"""The K/V pool of one instance: one flat allocation, viewed per layer. Positions of a row lie next to each other."""

import torch

from dilaserve.models.spec import ModelSpec, Shard


class KVPool:
    """K and V of `tokens` tokens; `keys[layer]` and `values[layer]` are [tokens, kv_heads / size, head_dim].

    The pool is dead memory between refreshes: nothing in it is ever needed to rebuild it.
    """

    def __init__(self, spec: ModelSpec, shard: Shard, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = spec.kv_heads // shard.size
        flat = torch.zeros(spec.layers * 2 * tokens * heads * spec.head_dim, dtype=dtype, device=device)
        pool = flat.view(spec.layers, 2, tokens, heads, spec.head_dim)
        self.tokens = tokens
        self.keys = list(pool[:, 0].unbind())
        self.values = list(pool[:, 1].unbind())

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v, [n, kv_heads, head_dim] each, at the pool tokens `slots`, [n]."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)
