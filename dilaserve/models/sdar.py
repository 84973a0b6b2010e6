"""SDAR 1.7B, 4B, 8B and 30B-A3B (JetAstra, 2025): the layers of Qwen3 and Qwen3-MoE.

A block sees itself and those before; the first one is at position 0. In bfloat16 the authors' norm multiplies by its
weight before it rounds, ours after that, which may change the last bit.
"""

import msgspec

from dilaserve.models.checkpoint import Checkpoint, shown
from dilaserve.models.config_fields import BLOCK, LAYERS, SIZE, TOKEN_ID, expert_counts, llama_spec
from dilaserve.models.spec import Experts, ModelSpec
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import FamilyTraits

EXAMPLES = ("JetLM/SDAR-1.7B-Chat", "JetLM/SDAR-4B-Chat", "JetLM/SDAR-8B-Chat")
MOE_EXAMPLES = ("JetLM/SDAR-30B-A3B-Chat",)
NAMES = TensorNames()
MASK_ID = 151669  # the tokenizer's files call it by different names
MOE = "SDARMoeForCausalLM"  # the architecture with experts; the other is SDARForCausalLM
TRAITS = FamilyTraits(
    attention="block",
    grid="start",
    exceeds=True,
    schedule="block",
    steps_per_block=True,
    rules=("threshold", "steps", "dynamic", "sequential"),
    confidence_threshold=0.95,
)


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of an SDAR config.json; `CheckpointError` names the field that cannot be served."""
    mask_id = checkpoint.whole("mask_token_id", TOKEN_ID, MASK_ID)
    moe = checkpoint.architecture == MOE
    spec = llama_spec(checkpoint, mask_id, qk_norm=True, experts=experts(checkpoint) if moe else None)
    traits = msgspec.structs.replace(TRAITS, block_length=checkpoint.whole("block_size", BLOCK, 4))
    return msgspec.structs.replace(spec, traits=traits)


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
