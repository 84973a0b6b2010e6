"""SDAR 1.7B, 4B, 8B and 30B-A3B (JetAstra, 2025): the layers of Qwen3 and Qwen3-MoE. They are not served yet: their
attention is block-causal.

In bfloat16 the authors' norm multiplies by its weight before it rounds, ours after that, which may change the last bit.
"""

from dilaserve.models.checkpoint import Checkpoint, shown
from dilaserve.models.config_fields import LAYERS, SIZE, expert_counts, llama_spec
from dilaserve.models.spec import Experts, ModelSpec
from dilaserve.models.weights import TensorNames

NAMES = TensorNames()
MASK_ID = 151669  # the tokenizer's files call it by different names
MOE = "SDARMoeForCausalLM"  # the architecture with experts; the other is SDARForCausalLM


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of an SDAR config.json; `CheckpointError` names the field that cannot be served."""
    mask_id = checkpoint.whole("mask_token_id", (0, 2**24), MASK_ID)
    moe = checkpoint.architecture == MOE
    return llama_spec(checkpoint, mask_id, qk_norm=True, experts=experts(checkpoint) if moe else None)


def experts(checkpoint: Checkpoint) -> Experts:
    count, chosen = expert_counts(checkpoint)
    return Experts(
        count=count,
        chosen=chosen,
        width=checkpoint.whole("moe_intermediate_size", SIZE),
        router="softmax-renormalised" if checkpoint.field("norm_topk_prob", bool) else "softmax",
        dense=dense_layers(checkpoint),
    )


def dense_layers(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Those of `mlp_only_layers`, and all but each `decoder_sparse_step`-th."""
    layers, listed = checkpoint.whole("num_hidden_layers", LAYERS), checkpoint.field("mlp_only_layers", list, [])
    step = checkpoint.whole("decoder_sparse_step", (1, LAYERS[1]), 1)
    if any(type(layer) is not int or not 0 <= layer < layers for layer in listed):
        raise checkpoint.wrong(f"mlp_only_layers must be numbers of layers, not {shown(listed)}")
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
