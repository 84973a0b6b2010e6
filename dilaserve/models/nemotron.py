"""Nemotron-Labs-Diffusion 3B, 8B and 14B: Ministral-3's layers; finished text is causal, the open block sees all.

The first token of a block is autoregressive: it comes from the causal logits of the position before the block.
"""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import TOKEN_ID, llama_spec
from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import CONFIDENCE_RULES, FamilyTraits

EXAMPLES = (
    "nvidia/Nemotron-Labs-Diffusion-3B",
    "nvidia/Nemotron-Labs-Diffusion-8B",
    "nvidia/Nemotron-Labs-Diffusion-14B",
)
NAMES = TensorNames(
    embedding="encoder.embed_tokens", norm="encoder.norm", head="diffusion_head", layer="encoder.layers.{}."
)


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a Nemotron-Labs-Diffusion config.json; `CheckpointError` names the field that cannot be served."""
    spec = llama_spec(checkpoint, checkpoint.whole("mask_token_id", TOKEN_ID), yarn=True)
    traits = FamilyTraits(attention="causal", first_token=True, steps_per_block=True, rules=CONFIDENCE_RULES)
    return msgspec.structs.replace(spec, traits=traits)
