"""Model families. Each module knows the fields and tensor names of one; nothing outside this package knows any.

Describing a checkpoint does not import torch, which takes seconds.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from dilaserve.config import CacheKind
from dilaserve.errors import CheckpointError, ConfigError
from dilaserve.models import (
    a2d,
    diffusion_gemma,
    dream,
    fast_dllm,
    gemma_tensor_names,
    illada,
    llada,
    llada2,
    llada_moe,
    nemotron,
    sdar,
    tensor_names,
)
from dilaserve.models.checkpoint import Checkpoint, Tensors, first_architecture
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.tensor_names import TensorNames
from dilaserve.system.files import read_json
from dilaserve.types import FamilyTraits

if TYPE_CHECKING:
    import torch

    from dilaserve.models.transformer import Model
    from dilaserve.models.weights import Weights

EXACT: tuple[CacheKind, ...] = ("exact",)
IGNORED = (
    "*.rotary_emb.inv_freq",  # computed from config.json
    "*.self_attn.k_scale",  # of K/V in FP8, which ours are not
    "*.self_attn.v_scale",
)


class Family(NamedTuple):
    """What a family's module gives: how to read its config.json, and what its tensors are called."""

    describe: Callable[[Checkpoint], ModelSpec]
    names: TensorNames
    ignored: tuple[str, ...] = IGNORED  # patterns of stored tensors that the model does without
    title: str = ""  # the family's name, as people call it
    examples: tuple[str, ...] = ()  # names of its models on the hub
    caches: tuple[CacheKind, ...] = ("none", "prefix", "dual")  # kinds of K/V reuse that make sense
    blockwise: FamilyTraits | None = None  # of its models with block-causal attention, whose files look the same
    blockwise_name: str = ""  # what stands in their names
    tensors: Callable[[ModelSpec, TensorNames], dict[str, tuple[int, ...]]] = tensor_names.tensors  # names and shapes
    layers: Literal["llama", "gemma"] = "llama"  # see `layers.LAYERS`


A2D = Family(
    a2d.describe,
    a2d.NAMES,
    title="A2D",
    examples=a2d.EXAMPLES,
    caches=("none", "prefix", "dual", "exact"),
    blockwise=a2d.BD3LM,
    blockwise_name=a2d.BD3LM_NAME,
)
FAMILIES: dict[str, Family] = {  # by `architectures` in config.json
    "LLaDAModelLM": Family(llada.describe, llada.NAMES, title="LLaDA", examples=llada.EXAMPLES),
    "LLaDAMoEModelLM": Family(llada_moe.describe, llada_moe.NAMES, title="LLaDA-MoE", examples=llada_moe.EXAMPLES),
    "ILLaDAForCausalLM": Family(illada.describe, illada.NAMES, title="iLLaDA", examples=illada.EXAMPLES),
    "A2DQwen3LMHeadModel": A2D,
    "A2DQwen2LMHeadModel": A2D,
    "A2DLlamaLMHeadModel": A2D,
    "DreamModel": Family(dream.describe, dream.NAMES, title="Dream", examples=dream.EXAMPLES),
    "SDARForCausalLM": Family(sdar.describe, sdar.NAMES, title="SDAR", examples=sdar.EXAMPLES, caches=EXACT),
    "SDARMoeForCausalLM": Family(sdar.describe, sdar.NAMES, title="SDAR-MoE", examples=sdar.MOE_EXAMPLES, caches=EXACT),
    "NemotronLabsDiffusionModel": Family(
        nemotron.describe,
        nemotron.NAMES,
        title="Nemotron-Labs-Diffusion",
        examples=nemotron.EXAMPLES,
        caches=EXACT,
    ),
    "Fast_dLLM_QwenForCausalLM": Family(
        fast_dllm.describe, fast_dllm.NAMES, title="Fast-dLLM v2", examples=fast_dllm.EXAMPLES, caches=EXACT
    ),
    "LLaDA2MoeModelLM": Family(llada2.describe, llada2.NAMES, title="LLaDA2.0", examples=llada2.EXAMPLES, caches=EXACT),
    "DiffusionGemmaForBlockDiffusion": Family(
        diffusion_gemma.describe,
        diffusion_gemma.NAMES,
        (*IGNORED, *diffusion_gemma.IGNORED),
        title="DiffusionGemma",
        examples=diffusion_gemma.EXAMPLES,
        caches=EXACT,
        tensors=gemma_tensor_names.tensors,
        layers="gemma",
    ),
}


def architecture_of(directory: Path) -> str:
    """What config.json names first; nothing else is read. Raises `CheckpointError`."""
    return first_architecture(directory / "config.json", read_json(directory / "config.json"))


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """What the checkpoint is, after checking that its tensors are all there with the right shapes, and no others.

    A head that is stored although it is tied to the embedding is not read. Only headers are. Raises `CheckpointError`.
    """
    family = family_of(checkpoint)
    spec = family.describe(checkpoint)
    names, tensors = family.names, family.tensors(spec, family.names)
    ignored = (*family.ignored, f"{names.head}.weight") if spec.tied else family.ignored
    checkpoint.expect(tensors, names.layer.split("{}")[0], ignored)
    return msgspec.structs.replace(spec, parameters=sum(map(math.prod, tensors.values())))


def outline(directory: Path) -> ModelSpec:
    """What a config.json without weights describes; the parameters are those that the family's tensors would have."""
    checkpoint = Checkpoint.outline(directory)
    family = family_of(checkpoint)
    spec = family.describe(checkpoint)
    return msgspec.structs.replace(spec, parameters=sum(map(math.prod, family.tensors(spec, family.names).values())))


def family_of(checkpoint: Checkpoint) -> Family:
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.directory} has the architecture {checkpoint.architecture!r}; "
            f"this version serves {', '.join(FAMILIES)}"
        )
    return family


def trained(spec: ModelSpec, name: str, attention: str) -> ModelSpec:
    """The spec with the attention that the model was trained with, where its files do not tell; `auto`: by its name.

    Raises `ConfigError`.
    """
    family = FAMILIES[spec.architecture]
    own = "block" if spec.traits.exact else "full"
    if attention == "auto":
        attention = "block" if family.blockwise_name and family.blockwise_name in name.lower() else own
    if attention == own:
        return spec
    if family.blockwise is None:
        raise ConfigError(
            f"--attention {attention}: all models of {family.title} have attention of the kind {own!r}; leave it out",
            param="attention",
        )
    return msgspec.structs.replace(spec, traits=family.blockwise)


def load(
    spec: ModelSpec,
    source: Tensors,
    device: "torch.device",
    dtype: "torch.dtype",
    placed: Callable[[int], None],
    held: Shard = Shard(),  # noqa: B008 - a frozen value
) -> "Weights":
    """The weights of a checkpoint on a device; see `weights.load`."""
    from dilaserve.models.layers import LAYERS

    family = FAMILIES[spec.architecture]
    return LAYERS[family.layers].load(spec, family.names, source, device, dtype, placed, held)


def model(
    spec: ModelSpec,
    weights: "Weights",
    shard: Shard,
    reduce: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
    turns: "torch.Tensor | None" = None,
) -> "Model":
    """The forward pass of one rank; see `transformer.Model`."""
    from dilaserve.models.layers import LAYERS
    from dilaserve.models.transformer import alone

    return LAYERS[FAMILIES[spec.architecture].layers].model(spec, weights, shard, reduce or alone, turns)
