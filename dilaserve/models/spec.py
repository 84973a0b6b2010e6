"""What the engine and the workers need to know of a model."""

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


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and special ids of one checkpoint. `groups` is the largest tensor-parallel degree its heads allow."""

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
    traits: FamilyTraits = FamilyTraits()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Tensor-parallel degrees that the heads allow."""
        return tuple(degree for degree in (1, 2, 4, 8) if self.groups % degree == 0)

    def shard_parameters(self, size: int) -> int:
        """Parameters that one of `size` shards holds: the embedding and the norms whole, of the rest its part."""
        table = self.vocab_size * self.hidden
        whole = table + self.hidden * (2 * self.layers + 1) + 2 * self.layers * self.head_dim * self.qk_norm
        return whole + -(-(self.parameters - whole) // size)

    @property
    def kv_elements(self) -> int:
        """K and V of one token over all layers, in elements."""
        return 2 * self.layers * self.kv_heads * self.head_dim
