"""LLaDA2.0 and 2.1, mini and flash (inclusionAI, 2025): a block sees itself and those before, counted from position 0.

A fused q, k and v projection; the first dimensions of a head are rotated; a sigmoid router over groups of experts.
"""

import msgspec

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import LAYERS, SIZE, expert_counts, llama_spec, mask_token
from dilaserve.models.spec import Experts, ModelSpec
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import FamilyTraits

EXAMPLES = ("inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.0-flash")
NAMES = TensorNames(
    embedding="model.word_embeddings",
    qkv="attention.query_key_value",
    q_norm="attention.query_layernorm",
    k_norm="attention.key_layernorm",
    out="attention.dense",
)
MASK = "<|mask|>"
TRAITS = FamilyTraits(
    attention="block",
    grid="start",
    block_length=32,
    exceeds=True,
    steps_per_block=True,
    schedule="block",
    edits=True,  # of LLaDA2.1; the files of 2.0 look the same
    rules=("threshold", "steps", "dynamic"),
    confidence_threshold=0.95,
)
SHARED = (0, 64)  # shared experts, which are one MLP of so many times an expert's width
SCALE = (0.0, 1e6)
ROTARY = (0.0, 1.0)
SUPPORTED = {  # fields whose other values would change the arithmetic
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32",),
    "norm_topk_prob": (True,),
    "norm_head": (False,),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a LLaDA2 config.json; `CheckpointError` names the field that cannot be served."""
    checkpoint.expect_fields(SUPPORTED)
    qk_norm = checkpoint.field("use_qk_norm", bool, True)
    spec = llama_spec(checkpoint, mask_token(checkpoint, MASK), qk_norm=qk_norm, experts=experts(checkpoint))
    factor = checkpoint.number("partial_rotary_factor", ROTARY, 1.0)
    rotary = int(spec.head_dim * factor)
    if rotary % 2 or not rotary:
        raise checkpoint.wrong(f"partial_rotary_factor {factor} of head_dim {spec.head_dim} is no even number")
    return msgspec.structs.replace(spec, rotary=rotary, traits=TRAITS)


def experts(checkpoint: Checkpoint) -> Experts:
    whole = checkpoint.whole
    (count, chosen), width = expert_counts(checkpoint), whole("moe_intermediate_size", SIZE)
    groups, kept = whole("n_group", (1, count)), whole("topk_group", (1, count))
    if count % groups or kept > groups or chosen > kept * (count // groups):
        raise checkpoint.wrong(
            f"num_experts {count}, n_group {groups}, topk_group {kept}, num_experts_per_tok {chosen} do not go together"
        )
    return Experts(
        count=count,
        chosen=chosen,
        width=width,
        router="sigmoid-groups",
        dense=tuple(range(min(whole("first_k_dense_replace", (0, LAYERS[1]), 0), whole("num_hidden_layers", LAYERS)))),
        shared=width * whole("num_shared_experts", SHARED, 0),
        bias=checkpoint.field("moe_router_enable_expert_bias", bool, True),
        groups=groups,
        kept_groups=kept,
        scale=checkpoint.number("routed_scaling_factor", SCALE),
        float32_sum=True,
    )
