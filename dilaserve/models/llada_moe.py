"""LLaDA-MoE-7B-A1B Base and Instruct (inclusionAI, 2025): Qwen3-like attention without a causal mask, OLMoE's router.

Its `model_type` is that of LLaDA-8B; `architectures` tells them apart.
"""

from dilaserve.models.checkpoint import Checkpoint, shown
from dilaserve.models.config_fields import LAYERS, SIZE, expert_counts, llama_spec, mask_token
from dilaserve.models.spec import Experts, ModelSpec
from dilaserve.models.tensor_names import TensorNames

EXAMPLES = ("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", "inclusionAI/LLaDA-MoE-7B-A1B-Base")
NAMES = TensorNames(expert_bias="mlp.expert_bias", shared="shared_expert.")
MASK = "<|mask|>"
SUPPORTED = {  # fields whose other values would change the arithmetic
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1,),
    "routed_scaling_factor": (1,),
    "partial_rotary_factor": (1,),
    "clip_qkv": (None,),
}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a LLaDA-MoE config.json; `CheckpointError` names the field that cannot be served."""
    checkpoint.expect_fields(SUPPORTED)
    count, chosen = expert_counts(checkpoint)
    shared = checkpoint.config.get("shared_expert_intermediate_size")
    experts = Experts(
        count=count,
        chosen=chosen,
        width=checkpoint.whole("expert_intermediate_size", SIZE),
        router="softmax",
        dense=dense_layers(checkpoint),
        shared=checkpoint.whole("shared_expert_intermediate_size", SIZE) if shared is not None else 0,
        bias=checkpoint.field("moe_router_enable_expert_bias", bool, False),
    )
    return llama_spec(
        checkpoint,
        mask_token(checkpoint, MASK),
        qk_norm=checkpoint.field("qk_layernorm", bool, True),
        experts=experts,
        mlp_field="dense_intermediate_size",
    )


def dense_layers(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The layers whose entry of `moe_layer_freq` is 0; without the field all have experts."""
    layers = checkpoint.whole("num_hidden_layers", LAYERS)
    entries = checkpoint.field("moe_layer_freq", list, [1] * layers)
    if len(entries) != layers or any(entry not in (0, 1) for entry in entries):
        raise checkpoint.wrong(f"moe_layer_freq must be a list of a 0 or 1 for each layer, not {shown(entries)}")
    return tuple(layer for layer, entry in enumerate(entries) if not entry)
