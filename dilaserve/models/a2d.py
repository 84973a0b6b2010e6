"""Autoregressive models turned into diffusion models by dllm's A2D recipe: Qwen3, Qwen2 and Llama without their masks.

The checkpoints of its MDLM sampler are served. Those of BD3LM, whose attention is block-causal, have the same fields
and tensors; nothing in a checkpoint tells them apart, and they would be served with full attention.
"""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import llama_spec, mask_token
from dilaserve.models.spec import ModelSpec
from dilaserve.models.weights import TensorNames
from dilaserve.types import FamilyTraits

EXAMPLES = ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",)
NAMES = TensorNames()
TRAITS = FamilyTraits(schedule="mdlm")
MASK = "<|mask|>"  # the token that the recipe adds to the tokenizer


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of an A2D config.json; `CheckpointError` names the field that cannot be served."""
    architecture = checkpoint.architecture
    spec = llama_spec(
        checkpoint,
        mask_token(checkpoint, MASK),
        qk_norm="Qwen3" in architecture,
        qkv_bias="Qwen2" in architecture,
    )
    return msgspec.structs.replace(spec, traits=TRAITS)
