"""SDAR 1.7B, 4B and 8B: Qwen3's layers; a block sees itself and those before; the first is at position 0."""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import BLOCK, TOKEN_ID, llama_spec
from dilaserve.models.spec import ModelSpec
from dilaserve.models.transformer import TensorNames
from dilaserve.types import FamilyTraits

NAMES = TensorNames()


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of an SDAR config.json; `CheckpointError` names the field that cannot be served."""
    spec = llama_spec(checkpoint, checkpoint.whole("mask_token_id", TOKEN_ID), qk_norm=True)
    traits = FamilyTraits(
        attention="block",
        grid="start",
        block_length=checkpoint.whole("block_size", BLOCK, 4),
        exceeds=True,
        schedule="block",
        steps_per_block=True,
        rules=("threshold", "steps", "dynamic", "sequential"),
        confidence_threshold=0.95,
    )
    return msgspec.structs.replace(spec, traits=traits)
