"""The weights of the transformer that all families share: published names, shapes, and their place on a device.

Fused projections lie by head group, so that the shard of any tensor-parallel degree is a view of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dilaserve.models.blocks import interleaved
from dilaserve.models.checkpoint import Tensors
from dilaserve.models.spec import ModelSpec, Shard


class TensorNames(NamedTuple):
    """Published names: of tensors outside the layers whole, of those in layer n behind `layer` with n in its braces.

    The defaults are those of Llama, Qwen2 and Qwen3 in transformers.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    attn_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    ff_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


def tensors(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Every published tensor name with its shape."""
    d, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {names.embedding: (spec.vocab_size, d), names.norm: (d,)}
    if not spec.tied:
        shapes[names.head] = (spec.vocab_size, d)
    layer: dict[str, tuple[int, ...]] = {
        names.attn_norm: (d,),
        names.ff_norm: (d,),
        names.q: (q, d),
        names.k: (kv, d),
        names.v: (kv, d),
        names.out: (d, q),
        names.gate: (spec.mlp, d),
        names.up: (spec.mlp, d),
        names.down: (d, spec.mlp),
    }
    if spec.qk_norm:
        layer |= {names.q_norm: (spec.head_dim,), names.k_norm: (spec.head_dim,)}
    for i in range(spec.layers):
        shapes |= {names.layer.format(i) + name: shape for name, shape in layer.items()}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    if spec.qkv_bias:
        for i in range(spec.layers):
            weights |= {f"{names.layer.format(i)}{name}.bias": layer[name][:1] for name in (names.q, names.k, names.v)}
    return weights


class Block(NamedTuple):
    """The weights of one layer. Fused projections lie by head group, so a TP shard of any degree is a run of rows."""

    attn_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [groups · (q + k + v heads of a group) · head_dim, hidden]
    attn_out: torch.Tensor  # [hidden, heads · head_dim]
    ff_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [groups · 2 · mlp / groups, hidden]
    down: torch.Tensor  # [hidden, mlp]
    qkv_bias: torch.Tensor | None = None  # [groups · (q + k + v heads of a group) · head_dim]
    q_norm: torch.Tensor | None = None  # [head_dim], in the order of the rotated pairs
    k_norm: torch.Tensor | None = None  # likewise

    def tensors(self) -> list[torch.Tensor]:
        """Those that the layer has."""
        return [tensor for tensor in self if tensor is not None]


class Weights(NamedTuple):
    """The weights that one device keeps: all of them, or where they do not fit the blocks and the head of one shard."""

    embedding: torch.Tensor  # [vocab, hidden]
    blocks: list[Block]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab / size, hidden]
    held: Shard


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

    def take(name: str, dim: int = 0, part: Shard = held) -> torch.Tensor:
        tensor = source[name]
        placed(tensor.nbytes)
        return tensor.chunk(part.size, dim)[part.rank]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def plain(name: str, dim: int = 0, part: Shard = Shard()) -> torch.Tensor:  # noqa: B008
        tensor = take(name, dim, part)
        return empty(*tensor.shape).copy_(tensor)

    def block(i: int) -> Block:
        name = names.layer.format(i)
        g, hd, d = spec.groups // held.size, spec.head_dim, spec.hidden
        q, kv = spec.heads // spec.groups * hd, spec.kv_heads // spec.groups * hd
        qkv, gate_up = empty(g, q + 2 * kv, d), empty(g, 2, spec.mlp // spec.groups, d)

        def weight(part: str) -> torch.Tensor:
            return take(f"{name}{part}.weight")

        qkv[:, :q] = interleaved(weight(names.q).to(device), hd).view(g, q, d)
        qkv[:, q : q + kv] = interleaved(weight(names.k).to(device), hd).view(g, kv, d)
        qkv[:, q + kv :] = weight(names.v).view(g, kv, d)
        gate_up[:, 0] = weight(names.gate).view(g, -1, d)
        gate_up[:, 1] = weight(names.up).view(g, -1, d)
        bias = None
        if spec.qkv_bias:
            bias = empty(g, q + 2 * kv)
            bias[:, :q] = interleaved(take(f"{name}{names.q}.bias").to(device), hd).view(g, q)
            bias[:, q : q + kv] = interleaved(take(f"{name}{names.k}.bias").to(device), hd).view(g, kv)
            bias[:, q + kv :] = take(f"{name}{names.v}.bias").view(g, kv)
        return Block(
            attn_norm=plain(f"{name}{names.attn_norm}.weight"),
            qkv=qkv.view(-1, d),
            attn_out=plain(f"{name}{names.out}.weight", 1, held),
            ff_norm=plain(f"{name}{names.ff_norm}.weight"),
            gate_up=gate_up.view(-1, d),
            down=plain(f"{name}{names.down}.weight", 1, held),
            qkv_bias=None if bias is None else bias.view(-1),
            q_norm=interleaved(plain(f"{name}{names.q_norm}.weight"), hd) if spec.qk_norm else None,
            k_norm=interleaved(plain(f"{name}{names.k_norm}.weight"), hd) if spec.qk_norm else None,
        )

    def head() -> torch.Tensor:
        mine = held.slice(spec.vocab_size)
        if spec.tied:
            return embedding[mine]
        tensor = take(f"{names.head}.weight", 0, Shard())[mine]
        return empty(*tensor.shape).copy_(tensor)

    embedding = plain(f"{names.embedding}.weight")
    blocks = [block(i) for i in range(spec.layers)]
    return Weights(embedding, blocks, plain(f"{names.norm}.weight"), head(), held)


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
    )
