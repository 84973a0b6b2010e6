"""Fast-dLLM v2 1.5B and 7B: Qwen2.5's layers; blocks of 32 see themselves and those before; logits of the next token.

The first token of a block comes from the last position of the block before, so it is an autoregressive one. The others
are unmasked eight positions at a time, as the authors' generate() does with its default small_block_size.
"""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import BLOCK, TOKEN_ID, llama_spec
from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import CONFIDENCE_RULES, FamilyTraits

EXAMPLES = ("Efficient-Large-Model/Fast_dLLM_v2_1.5B", "Efficient-Large-Model/Fast_dLLM_v2_7B")
NAMES = TensorNames()
MASK_ID = 151665  # `|<MASK>|`; the authors' code has it as a default argument
BLOCK_LENGTH, PART_LENGTH = 32, 8


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a Fast-dLLM v2 config.json; `CheckpointError` names the field that cannot be served."""
    mask_id = checkpoint.whole("mask_token_id", TOKEN_ID, MASK_ID)
    spec = llama_spec(checkpoint, mask_id, qkv_bias=True)
    block = checkpoint.whole("bd_size", BLOCK, BLOCK_LENGTH)
    traits = FamilyTraits(
        attention="block",
        grid="start",
        block_length=block,
        logit_shift=1,
        first_token=True,
        part_length=min(PART_LENGTH, block),
        exceeds=True,
        steps_per_block=True,
        rules=CONFIDENCE_RULES,
    )
    return msgspec.structs.replace(spec, traits=traits)
