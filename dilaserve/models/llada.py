"""LLaDA-8B Base, Instruct and 1.5: a Llama-like encoder without a mask (arXiv 2502.09992).

Knows the published field and tensor names, and the forward pass over packed spans.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dilaserve.models.attention import attend
from dilaserve.models.blocks import interleaved, kernels_for, rms_norm, rotary_table
from dilaserve.models.checkpoint import Checkpoint, Tensors, shown
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Packed
from dilaserve.models.spec import ModelSpec, Shard

MAX_DEGREE = 8
SIZE = (1, 2**24)  # of a dimension, in elements
LAYERS = (1, 1024)
LENGTH = (2, 2**24)  # of a canvas, in tokens
MLP_RATIO = (2**-10, 2**10)
ROPE_THETA = (1.0, 1e12)  # below, angles grow with the frequency's number until they overflow
NORM_EPS = (1e-20, 1.0)  # below, a row of zeros may become NaN; above, it outweighs the row
ROOT = "model.transformer."
UNSUPPORTED = {  # fields whose other values would change the arithmetic below
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "attention_layer_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "multi_query_attention": (False,),
}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a LLaDA config.json; `CheckpointError` names the field that cannot be served."""
    for name, allowed in UNSUPPORTED.items():
        value = checkpoint.config.get(name)
        if value is not None and value not in allowed:
            raise checkpoint.wrong(f"{name} {shown(value)} is not supported, only {allowed[0]!r}")
    whole, number = checkpoint.whole, checkpoint.number
    hidden, heads = whole("d_model", SIZE), whole("n_heads", SIZE)
    kv_heads = whole("n_kv_heads", SIZE, heads)
    if hidden % heads or heads % kv_heads or hidden // heads % 2:
        raise checkpoint.wrong(f"d_model {hidden}, n_heads {heads}, n_kv_heads {kv_heads} do not go together")
    vocab = whole("embedding_size", SIZE, whole("vocab_size", SIZE))
    mlp = whole("mlp_hidden_size", SIZE, mlp_by_ratio(checkpoint, hidden))
    return ModelSpec(
        architecture=checkpoint.architecture,
        vocab_size=vocab,
        layers=whole("n_layers", LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        mlp=mlp,
        groups=math.gcd(kv_heads, mlp, MAX_DEGREE),
        rope_theta=number("rope_theta", ROPE_THETA, 10000.0),
        norm_eps=number("rms_norm_eps", NORM_EPS, 1e-5),
        max_length=whole("max_sequence_length", LENGTH),
        tied=checkpoint.field("weight_tying", bool, False),
        mask_id=whole("mask_token_id", (0, vocab - 1)),
        stop_ids=checkpoint.end_ids(vocab),
        parameters=sum(math.prod(shape) for shape in checkpoint.shapes.values()),
    )


def mlp_by_ratio(checkpoint: Checkpoint, hidden: int) -> int:
    """The MLP's size where config.json states only how many times the hidden size it is."""
    size = hidden * checkpoint.number("mlp_ratio", MLP_RATIO, 4)
    if not size.is_integer() and checkpoint.config.get("mlp_hidden_size") is None:
        raise checkpoint.wrong(f"mlp_ratio times d_model must be a whole number, not {size:g}")
    return int(size)


def tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every published tensor name with its shape."""
    d, kv = spec.hidden, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {ROOT + "wte.weight": (spec.vocab_size, d), ROOT + "ln_f.weight": (d,)}
    if not spec.tied:
        shapes[ROOT + "ff_out.weight"] = (spec.vocab_size, d)
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "ff_norm": (d,),
        "q_proj": (d, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "attn_out": (d, d),
        "ff_proj": (spec.mlp, d),
        "up_proj": (spec.mlp, d),
        "ff_out": (d, spec.mlp),
    }
    for i in range(spec.layers):
        shapes |= {f"{ROOT}blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


class Block(NamedTuple):
    """The weights of one layer. Fused projections lie by head group, so a TP shard of any degree is a run of rows."""

    attn_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [groups · (q + k + v heads of a group) · head_dim, hidden]
    attn_out: torch.Tensor  # [hidden, hidden]
    ff_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [groups · 2 · mlp / groups, hidden]
    down: torch.Tensor  # [hidden, mlp]


class Weights(NamedTuple):
    """The weights that one device keeps: all of them, or where they do not fit the blocks and the head of one shard."""

    embedding: torch.Tensor  # [vocab, hidden]
    blocks: list[Block]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab / size, hidden]
    held: Shard


def load(
    spec: ModelSpec,
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
        tensor = source[f"{ROOT}{name}.weight"]
        placed(tensor.nbytes)
        return tensor.chunk(part.size, dim)[part.rank]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def plain(name: str, dim: int = 0, part: Shard = Shard()) -> torch.Tensor:  # noqa: B008
        tensor = take(name, dim, part)
        return empty(*tensor.shape).copy_(tensor)

    def block(i: int) -> Block:
        name = f"blocks.{i}."
        g, hd, d = spec.groups // held.size, spec.head_dim, spec.hidden
        q, kv = spec.heads // spec.groups * hd, spec.kv_heads // spec.groups * hd
        qkv, gate_up = empty(g, q + 2 * kv, d), empty(g, 2, spec.mlp // spec.groups, d)
        qkv[:, :q] = interleaved(take(name + "q_proj").to(device), hd).view(g, q, d)
        qkv[:, q : q + kv] = interleaved(take(name + "k_proj").to(device), hd).view(g, kv, d)
        qkv[:, q + kv :] = take(name + "v_proj").view(g, kv, d)
        gate_up[:, 0] = take(name + "ff_proj").view(g, -1, d)
        gate_up[:, 1] = take(name + "up_proj").view(g, -1, d)
        return Block(
            attn_norm=plain(name + "attn_norm"),
            qkv=qkv.view(-1, d),
            attn_out=plain(name + "attn_out", 1, held),
            ff_norm=plain(name + "ff_norm"),
            gate_up=gate_up.view(-1, d),
            down=plain(name + "ff_out", 1, held),
        )

    def head() -> torch.Tensor:
        mine = held.slice(spec.vocab_size)
        if spec.tied:
            return embedding[mine]
        tensor = take("ff_out", 0, Shard())[mine]
        return empty(*tensor.shape).copy_(tensor)

    embedding = plain("wte")
    blocks = [block(i) for i in range(spec.layers)]
    return Weights(embedding, blocks, plain("ln_f"), head(), held)


def shard_of(block: Block, shard: Shard) -> Block:
    """One rank's views of a layer; nothing is copied."""

    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(shard.size)[shard.rank]

    def columns(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(shard.size, dim=1)[shard.rank]

    return block._replace(
        qkv=rows(block.qkv), attn_out=columns(block.attn_out), gate_up=rows(block.gate_up), down=columns(block.down)
    )


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
        self.spec, self.weights, self.reduce = spec, weights, reduce
        self.blocks = [shard_of(block, shard.part(weights.held)) for block in weights.blocks]
        self.groups = spec.groups // shard.size
        self.q, self.kv = spec.heads // spec.groups, spec.kv_heads // spec.groups
        self.vocabulary = shard.slice(spec.vocab_size)
        first = weights.held.slice(spec.vocab_size).start
        self.head = weights.head[self.vocabulary.start - first : self.vocabulary.stop - first]
        device = weights.norm.device
        self.kernels = kernels_for(device)
        self.turns = rotary_table(spec.max_length, spec.head_dim, spec.rope_theta, device) if turns is None else turns

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
            groups = packed.groups
            if last and packed.kept is not None:
                x, q, groups = x[packed.kept], q[packed.kept], packed.kept_groups
            mixed = F.linear(attend(q, pool, i, groups, kernels).flatten(1), block.attn_out)
            x, h = kernels.add_norm(x, self.reduce(mixed), block.ff_norm, eps)
            fed = self.reduce(self.feed_forward(block, h))
            x, h = kernels.add_norm(x, fed, self.weights.norm if last else blocks[i + 1].attn_norm, eps)
        return h

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] → [n, the rank's part of the vocabulary] in the model's type, unscaled."""
        return F.linear(hidden, self.head)

    def project(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        """q, k and v of each head group, [tokens, groups, q + 2 kv, head_dim], not rotated yet."""
        return F.linear(x, block.qkv).view(len(x), self.groups, self.q + 2 * self.kv, self.spec.head_dim)

    def feed_forward(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        gate_up = F.linear(x, block.gate_up).view(len(x), self.groups, 2, -1)
        return F.linear(self.kernels.gated(gate_up), block.down)
