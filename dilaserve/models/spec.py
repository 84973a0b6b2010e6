"""What the engine and the workers need to know of a model."""

import math
from typing import Literal

import msgspec

from dilaserve.types import FamilyTraits


class Shard(msgspec.Struct, frozen=True):
    """The part of every layer that one rank of a TP group computes."""

    rank: int = 0
    size: int = 1

    def part(self, held: "Shard") -> "Shard":
        """Where this shard lies in the one that is held, of which it must be a part."""
        return Shard(self.rank % (self.size // held.size), self.size // held.size)

    def slice(self, total: int) -> slice:
        """This rank's part of `total` things; the parts differ by one at most."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)


class Yarn(msgspec.Struct, frozen=True, kw_only=True):
    """Frequencies of rotary positions stretched for long texts (YaRN, arXiv 2309.00071, section 3), as in transformers.

    `factor` may be below 1. `magnitude` multiplies cosines and sines.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0


class QueryScale(msgspec.Struct, frozen=True, kw_only=True):
    """Queries at position p are multiplied by 1 + beta · ln(1 + floor(p / length)) (Llama 4, Ministral 3)."""

    beta: float
    length: int


class FullLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that see all that lies before, among others with a sliding window; their heads have a shape of their own.

    Their values are the keys before norm and rotation: they have no projection for values (Gemma 4).
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    rope_theta: float
    rotary: int  # dimensions of a head that are rotated


class NoiseSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """How a block without masks is denoised (DiffusionGemma's generation_config.json).

    It begins as random tokens. Step s of N divides the logits by `coldest` + (`hottest` - `coldest`) · (N - s + 1) / N.
    """

    steps: int  # N, at most
    coldest: float
    hottest: float
    entropy_bound: float  # nats; drawn tokens are kept, the surest first, until the entropies before exceed it
    stable_steps: int  # the best tokens must be those of so many steps before ...
    mean_entropy: float  # ... and the entropy per position below this, in nats, so that a block ends before step N


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of a mixture-of-experts model. Layers that are not `dense` have them in place of the MLP."""

    count: int  # of a layer
    chosen: int  # for each token
    width: int  # of one expert's MLP
    router: Literal["softmax", "softmax-renormalised", "softmax-scaled", "sigmoid-groups"]
    dense: tuple[int, ...] = ()  # layers
    shared: int = 0  # width of the expert beside the others that takes every token
    bias: bool = False  # the router adds one to the scores by which it chooses
    groups: int = 1  # of experts
    kept_groups: int = 1  # groups that a token's experts are chosen from
    scale: float = 1.0  # of the sigmoid router's weights
    float32_sum: bool = False  # weighted and summed in float32, not in the model's type


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and special ids of one checkpoint. `groups` is the largest tensor-parallel degree it allows."""

    architecture: str
    vocab_size: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    groups: int
    rope_theta: float
    norm_eps: float
    max_length: int
    tied: bool
    mask_id: int
    stop_ids: tuple[int, ...]
    parameters: int
    qk_norm: bool = False  # queries and keys are normed by head before the rotation
    qkv_bias: bool = False
    yarn: Yarn | None = None
    query_scale: QueryScale | None = None
    rotary: int | None = None  # dimensions of a head that are rotated, the first ones; None: all
    experts: Experts | None = None
    window: int | None = None  # keys that a query sees, itself among them, in layers that are not `full`; None: all
    full: FullLayers | None = None
    softcap: float | None = None  # logits are this · tanh(logits / this)
    unsharded: int = 0  # parameters beyond norms, routers and the embedding that every shard holds whole
    noise: NoiseSchedule | None = None  # None: blocks begin as masks
    traits: FamilyTraits = FamilyTraits()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Tensor-parallel degrees that heads, MLP and experts allow."""
        return tuple(degree for degree in (1, 2, 4, 8) if self.groups % degree == 0)

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of this layer; None where it is dense."""
        return None if self.experts is None or layer in self.experts.dense else self.experts

    def mlp_of(self, layer: int) -> int:
        """Width of the MLP that every token of this layer goes through: the dense one or the shared expert."""
        experts = self.experts_of(layer)
        return self.mlp if experts is None else experts.shared

    def is_full(self, layer: int) -> bool:
        """Whether the layer's heads have the shape of `full`."""
        return self.full is not None and layer in self.full.layers

    def kv_shape(self, layer: int) -> tuple[int, int]:
        """K/V heads of the layer, and their size."""
        full = self.full
        return (full.kv_heads, full.head_dim) if full and self.is_full(layer) else (self.kv_heads, self.head_dim)

    def shard_parameters(self, size: int) -> int:
        """Parameters that one of `size` shards holds: the embedding, norms and routers whole, of the rest its part."""
        table, norms = self.vocab_size * self.hidden, self.hidden * (2 * self.layers + 1)
        whole = table + norms + self.unsharded + 2 * self.layers * self.head_dim * self.qk_norm
        if self.experts is not None:
            routers = self.layers - len(self.experts.dense)
            whole += routers * self.experts.count * (self.hidden + self.experts.bias)
        return whole + -(-(self.parameters - whole) // size)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim if self.rotary is None else self.rotary

    @property
    def kv_elements(self) -> int:
        """K and V of one token over all layers, in elements."""
        return 2 * sum(math.prod(self.kv_shape(layer)) for layer in range(self.layers))
