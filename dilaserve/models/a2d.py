"""Autoregressive models turned into diffusion models by dllm's A2D recipe: Qwen3, Qwen2 and Llama without their masks.

Checkpoints of its MDLM sampler have full attention, those of BD3LM block-causal. Fields and tensors are the same: only
the model's name tells them apart.
"""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import llama_spec, mask_token
from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import CONFIDENCE_RULES, FamilyTraits

EXAMPLES = ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1")
NAMES = TensorNames()
TRAITS = FamilyTraits(schedule="mdlm")
BD3LM = FamilyTraits(  # the other sampler of the recipe; blocks are counted from the prompt's end, to both sides
    attention="block", block_length=32, schedule="mdlm", rules=CONFIDENCE_RULES
)
BD3LM_NAME = "bd3lm"  # in the names of such models
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
