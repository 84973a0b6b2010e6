"""Dream-v0-7B, DiffuCoder-7B, Dream-Coder-7B: Qwen2.5's layers without a causal mask; logits are of the next token."""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import TOKEN_ID, llama_spec
from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import FamilyTraits

EXAMPLES = ("Dream-org/Dream-v0-Instruct-7B", "Dream-org/Dream-Coder-v0-Instruct-7B", "apple/DiffuCoder-7B-Instruct")
NAMES = TensorNames()
TRAITS = FamilyTraits(
    logit_shift=1,
    first_token=True,  # Fast-dLLM's loop with a cache takes only that from a block's refresh
    schedule="dream",
    rules=("threshold", "steps", "factor", "dynamic", "sequential", "entropy", "margin"),
)


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a Dream config.json; `CheckpointError` names the field that cannot be served."""
    spec = llama_spec(checkpoint, checkpoint.whole("mask_token_id", TOKEN_ID), qkv_bias=True)
    return msgspec.structs.replace(spec, traits=TRAITS)
