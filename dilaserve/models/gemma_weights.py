"""The weights of Gemma 4's layers as DiffusionGemma has them, and their place on a device."""

from collections.abc import Callable

import torch

from dilaserve.models.blocks import interleaved
from dilaserve.models.checkpoint import Tensors
from dilaserve.models.experts import ExpertWeights
from dilaserve.models.gemma_parts import GemmaLayer, GemmaParts
from dilaserve.models.gemma_tensor_names import CONDITIONING, ENCODER, NORMS
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.tensor_names import TensorNames
from dilaserve.models.weights import Block, Reader, Weights


def load(
    spec: ModelSpec,
    names: TensorNames,
    source: Tensors,
    device: torch.device,
    dtype: torch.dtype,
    placed: Callable[[int], None],
    held: Shard = Shard(),  # noqa: B008 - a frozen value
) -> Weights:
    """Read the checkpoint straight into its place on the device; see `weights.load`."""
    reader = GemmaReader(spec, names, source, device, dtype, placed, held)
    embedding = reader.whole(f"{names.embedding}.weight")
    blocks = [reader.block(i) for i in range(spec.layers)]
    norm, head = reader.whole(f"{names.norm}.weight"), embedding[held.slice(spec.vocab_size)]
    gate, up = (reader.read(f"{CONDITIONING}{name}_proj.weight") for name in ("gate", "up"))
    before, down = (reader.whole(f"{CONDITIONING}{name}.weight") for name in ("pre_norm", "down_proj"))
    layers = [reader.norms(i) for i in range(spec.layers)]
    parts = GemmaParts(layers, before, reader.copied(torch.cat([gate, up])), down)
    return Weights(embedding, blocks, norm, head, held, parts)


class GemmaReader(Reader):
    """Reads the layers of a checkpoint to their place."""

    def norms(self, i: int) -> GemmaLayer:
        prefix = self.names.layer.format(i)
        norms = [self.whole(f"{prefix}{name}.weight") for name in NORMS]
        scale = self.whole(f"{prefix}router.scale")
        finished, noisy = (self.whole(f"{one}layer_scalar") for one in (ENCODER.format(i), prefix))
        return GemmaLayer(*[*norms, scale, finished, noisy])

    def block(self, i: int) -> Block:
        names, prefix, head_dim = self.names, self.names.layer.format(i), self.spec.kv_shape(i)[1]
        gate, up = (self.part(f"{prefix}{name}.weight") for name in (names.gate, names.up))
        q_norm, k_norm = (
            interleaved(self.whole(f"{prefix}{name}.weight").float(), head_dim, head_dim)
            for name in (names.q_norm, names.k_norm)
        )
        return Block(
            attn_norm=self.whole(f"{prefix}{names.attn_norm}.weight"),
            qkv=self.projections(i, prefix, head_dim),
            attn_out=self.copied(self.part(f"{prefix}{names.out}.weight", 1)),
            ff_norm=self.whole(f"{prefix}{names.ff_norm}.weight"),
            gate_up=self.fused(gate, up),
            down=self.copied(self.part(f"{prefix}{names.down}.weight", 1)),
            q_norm=q_norm * head_dim**0.5,  # attention divides by it, and Gemma's does not
            k_norm=k_norm,
            experts=self.stacked(prefix),
        )

    def projections(self, i: int, prefix: str, head_dim: int) -> torch.Tensor:
        """The fused projection of q, k and v by head group; v has the rows of k where it has none of its own."""
        names = self.names
        q, k = self.part(f"{prefix}{names.q}.weight"), self.part(f"{prefix}{names.k}.weight")
        v = k if self.spec.is_full(i) else self.part(f"{prefix}{names.v}.weight")
        turned = [interleaved(one.to(self.device), head_dim, head_dim) for one in (q, k)]
        return self.fused(*turned, v)

    def stacked(self, prefix: str) -> ExpertWeights:
        """The held shard's experts, and the whole router."""
        gate_up, down = (self.copied(self.part(f"{prefix}experts.{name}_proj")) for name in ("gate_up", "down"))
        router, scale = self.whole(f"{prefix}router.proj.weight"), self.whole(f"{prefix}router.per_expert_scale")
        return ExpertWeights(router, gate_up, down, scale=scale)
