"""Model families. Each module knows the fields and tensor names of one; nothing outside this package knows any."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dilaserve.errors import CheckpointError
from dilaserve.models import a2d, dream, fast_dllm, illada, llada, llada2, llada_moe, nemotron, sdar, weights
from dilaserve.models.checkpoint import Checkpoint, Tensors
from dilaserve.models.spec import ModelSpec, Shard
from dilaserve.models.weights import TensorNames, Weights


class Family(NamedTuple):
    """What a family's module gives: how to read its config.json, and what its tensors are called."""

    describe: Callable[[Checkpoint], ModelSpec]
    names: TensorNames


FAMILIES: dict[str, Family] = {  # by `architectures` in config.json
    "LLaDAModelLM": Family(llada.describe, llada.NAMES),
    "LLaDAMoEModelLM": Family(llada_moe.describe, llada_moe.NAMES),
    "ILLaDAForCausalLM": Family(illada.describe, illada.NAMES),
    "A2DQwen3LMHeadModel": Family(a2d.describe, a2d.NAMES),
    "A2DQwen2LMHeadModel": Family(a2d.describe, a2d.NAMES),
    "A2DLlamaLMHeadModel": Family(a2d.describe, a2d.NAMES),
    "DreamModel": Family(dream.describe, dream.NAMES),
    "SDARForCausalLM": Family(sdar.describe, sdar.NAMES),
    "SDARMoeForCausalLM": Family(sdar.describe, sdar.NAMES),
    "NemotronLabsDiffusionModel": Family(nemotron.describe, nemotron.NAMES),
    "Fast_dLLM_QwenForCausalLM": Family(fast_dllm.describe, fast_dllm.NAMES),
    "LLaDA2MoeModelLM": Family(llada2.describe, llada2.NAMES),
}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """What the checkpoint is, after checking that its tensors are all there with the right shapes.

    Reads headers only. Raises `CheckpointError`.
    """
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.directory} has the architecture {checkpoint.architecture!r}; "
            f"this version serves {', '.join(FAMILIES)}"
        )
    spec = family.describe(checkpoint)
    checkpoint.expect(weights.tensors(spec, family.names))
    return spec


def load(
    spec: ModelSpec,
    source: Tensors,
    device: torch.device,
    dtype: torch.dtype,
    placed: Callable[[int], None],
    held: Shard = Shard(),  # noqa: B008 - a frozen value
) -> Weights:
    """The weights of a checkpoint on a device; see `weights.load`."""
    return weights.load(spec, FAMILIES[spec.architecture].names, source, device, dtype, placed, held)
