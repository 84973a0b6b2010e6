"""The K/V pool of one instance: one flat allocation, viewed per layer. Positions of a row lie next to each other."""

import math

import torch

from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.types import PAGE


class KVPool:
    """K and V in `flat`; `keys[layer]` and `values[layer]` are [tokens, kv_heads / size, head_dim] of the layer.

    A shard has fewer heads and so more tokens in the same memory. Nothing in it is ever needed to rebuild it.
    """

    def __init__(self, spec: ModelSpec, shard: Shard, flat: torch.Tensor) -> None:
        self.tokens = flat.numel() * shard.size // spec.kv_elements
        self.keys, self.values, start = list[torch.Tensor](), list[torch.Tensor](), 0
        for layer in range(spec.layers):
            heads, head_dim = spec.kv_shape(layer)
            shape = 2, self.tokens, heads // shard.size, head_dim
            keys, values = flat[start : start + math.prod(shape)].view(shape)
            self.keys.append(keys)
            self.values.append(values)
            start += math.prod(shape)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy K/V of so many tokens of all layers; the two places may overlap."""
        for pool in (*self.keys, *self.values):
            part = pool[source : source + tokens]
            pool[target : target + tokens] = part.clone() if abs(source - target) < tokens else part

    @property
    def spare(self) -> int:
        """The first token of the last page, which belongs to no row: rows that pad a batch write there."""
        return self.tokens - PAGE
