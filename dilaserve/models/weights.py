"""The weights of the transformer that all families share, and their place on a device.

Fused projections lie by head group, so that the shard of any tensor-parallel degree is a view of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dilaserve.models.blocks import interleaved
from dilaserve.models.checkpoint import Tensors
from dilaserve.models.experts import ExpertWeights
from dilaserve.models.gemma_parts import GemmaParts
from dilaserve.models.spec import Experts, ModelSpec, Shard
from dilaserve.models.tensor_names import MLP, TensorNames, mlp_names


class Block(NamedTuple):
    """The weights of one layer. Fused projections lie by head group, so a TP shard of any degree is a run of rows."""

    attn_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [groups · (q + k + v heads of a group) · head_dim, hidden]
    attn_out: torch.Tensor  # [hidden, heads · head_dim]
    ff_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [groups · 2 · mlp / groups, hidden]; the dense MLP or the shared expert, of width 0 if none
    down: torch.Tensor  # [hidden, mlp]
    qkv_bias: torch.Tensor | None = None  # [groups · (q + k + v heads of a group) · head_dim]
    q_norm: torch.Tensor | None = None  # [head_dim], in the order of the rotated pairs
    k_norm: torch.Tensor | None = None  # likewise
    experts: ExpertWeights | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those that the layer has."""
        parts = [*self[:-1], *(self.experts or ())]
        return [tensor for tensor in parts if isinstance(tensor, torch.Tensor)]


class Weights(NamedTuple):
    """The weights that one device keeps: all of them, or where they do not fit the blocks and the head of one shard."""

    embedding: torch.Tensor  # [vocab, hidden]
    blocks: list[Block]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab / size, hidden]
    held: Shard
    gemma: GemmaParts | None = None


def load(
    spec: ModelSpec,
    names: TensorNames,
    source: Tensors,
    device: torch.device,
    dtype: torch.dtype,
    placed: Callable[[int], None],
    held: Shard = Shard(),  # noqa: B008 - a frozen value
) -> Weights:
    """Read the checkpoint straight into its fused place on the device; `placed(nbytes)` reports progress.

    Of a shard only its part is read: the files are mapped, and the rows and columns of a shard lie together.
    """
    reader = Reader(spec, names, source, device, dtype, placed, held)
    embedding = reader.whole(f"{names.embedding}.weight")
    blocks = [reader.block(i) for i in range(spec.layers)]
    mine = held.slice(spec.vocab_size)
    head = embedding[mine] if spec.tied else reader.copied(reader.read(f"{names.head}.weight")[mine])
    return Weights(embedding, blocks, reader.whole(f"{names.norm}.weight"), head, held)


class Reader:
    """Reads tensors of a checkpoint to their place; see `load`."""

    def __init__(
        self,
        spec: ModelSpec,
        names: TensorNames,
        source: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        placed: Callable[[int], None],
        held: Shard,
    ) -> None:
        self.spec, self.names, self.source, self.held = spec, names, source, held
        self.device, self.dtype, self.placed = device, dtype, placed
        self.groups = spec.groups // held.size

    def read(self, name: str) -> torch.Tensor:
        tensor = self.source[name]
        self.placed(tensor.nbytes)
        return tensor

    def part(self, name: str, dim: int = 0) -> torch.Tensor:
        return self.mine(self.read(name), dim)

    def mine(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The part of a tensor that the held shard has."""
        return tensor.chunk(self.held.size, dim)[self.held.rank]

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(*tensor.shape).copy_(tensor)

    def whole(self, name: str) -> torch.Tensor:
        return self.copied(self.read(name))

    def block(self, i: int) -> Block:
        spec, names, prefix = self.spec, self.names, self.names.layer.format(i)
        gate_up, down = self.mlp(prefix, i)
        return Block(
            attn_norm=self.whole(f"{prefix}{names.attn_norm}.weight"),
            qkv=self.qkv(prefix, "weight"),
            attn_out=self.copied(self.part(f"{prefix}{names.out}.weight", 1)),
            ff_norm=self.whole(f"{prefix}{names.ff_norm}.weight"),
            gate_up=gate_up,
            down=down,
            qkv_bias=self.qkv(prefix, "bias") if spec.qkv_bias else None,
            q_norm=self.pairs(self.whole(f"{prefix}{names.q_norm}.weight")) if spec.qk_norm else None,
            k_norm=self.pairs(self.whole(f"{prefix}{names.k_norm}.weight")) if spec.qk_norm else None,
            experts=None if (experts := spec.experts_of(i)) is None else self.experts(prefix, experts),
        )

    def pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        return interleaved(tensor.to(self.device), self.spec.head_dim, self.spec.rotary_dim)

    def qkv(self, prefix: str, kind: str) -> torch.Tensor:
        """The fused projection or its bias, by head group."""
        spec, names = self.spec, self.names
        if names.qkv is None:
            q, k, v = (self.part(f"{prefix}{name}.{kind}") for name in (names.q, names.k, names.v))
        else:
            heads = [count * spec.head_dim for count in (spec.heads, spec.kv_heads, spec.kv_heads)]
            q, k, v = map(self.mine, torch.split(self.read(f"{prefix}{names.qkv}.{kind}"), heads))
        return self.fused(self.pairs(q), self.pairs(k), v)

    def fused(self, *parts: torch.Tensor) -> torch.Tensor:
        """The rows of each head group of all parts side by side."""
        rest = parts[0].shape[1:]
        rows = [len(part) // self.groups for part in parts]
        out = self.empty(self.groups, sum(rows), *rest)
        for place, part in zip(torch.split(out, rows, 1), parts, strict=True):
            place.copy_(part.view(place.shape))
        return out.view(-1, *rest)

    def mlp(self, prefix: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and ups by head group, and downs, of what every token goes through."""
        if not self.spec.mlp_of(layer):
            return self.empty(0, self.spec.hidden), self.empty(self.spec.hidden, 0)
        gate, up, down = (f"{prefix}{name}.weight" for name in mlp_names(self.spec, self.names, layer))
        return self.fused(self.part(gate), self.part(up)), self.copied(self.part(down, 1))

    def experts(self, prefix: str, experts: Experts) -> ExpertWeights:
        """The held shard's experts, each gate above its up, and the whole router."""
        names, hidden = self.names, self.spec.hidden
        mine = range(experts.count)[self.held.slice(experts.count)]
        gate_up = self.empty(len(mine), 2, experts.width, hidden)
        down = self.empty(len(mine), hidden, experts.width)
        for place, expert in enumerate(mine):
            named = [f"{prefix}{names.expert.format(expert)}{name}.weight" for name in MLP]
            for target, name in zip((*gate_up[place], down[place]), named, strict=True):
                target.copy_(self.read(name))
        bias = self.read(prefix + names.expert_bias).to(self.device, torch.float32) if experts.bias else None
        return ExpertWeights(self.whole(f"{prefix}{names.router}.weight"), gate_up.flatten(1, 2), down, bias)


def shard_of(block: Block, shard: Shard) -> Block:
    """One rank's views of a layer; nothing is copied."""

    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(shard.size)[shard.rank]

    def columns(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(shard.size, dim=1)[shard.rank]

    return block._replace(
        qkv=rows(block.qkv),
        attn_out=columns(block.attn_out),
        gate_up=rows(block.gate_up),
        down=columns(block.down),
        qkv_bias=None if block.qkv_bias is None else rows(block.qkv_bias),
        experts=block.experts
        and block.experts._replace(gate_up=rows(block.experts.gate_up), down=rows(block.experts.down)),
    )
