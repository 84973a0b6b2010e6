"""iLLaDA-8B Base and Instruct (GSAI-ML, 2026): Llama's layers without a causal mask, tied embeddings."""

from dilaserve.models.checkpoint import Checkpoint, shown
from dilaserve.models.config_fields import TOKEN_ID, llama_spec
from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames

EXAMPLES = ("GSAI-ML/iLLaDA-8B-Instruct", "GSAI-ML/iLLaDA-8B-Base")
NAMES = TensorNames()
MASK_ID = 5  # `<[MASK]>`; neither config.json nor the tokenizer says so


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of an iLLaDA config.json; `CheckpointError` names the field that cannot be served."""
    if (eps := checkpoint.config.get("layer_norm_eps")) is not None:
        raise checkpoint.wrong(f"layer_norm_eps {shown(eps)} is not supported: only RMS norms are, without that field")
    mask_id = checkpoint.whole("mask_token_id", TOKEN_ID, MASK_ID)
    return llama_spec(checkpoint, mask_id)
