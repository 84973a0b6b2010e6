"""LLaDA-8B Base, Instruct and 1.5 (arXiv 2502.09992): published field and tensor names."""

import math

from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.config_fields import LAYERS, LENGTH, MAX_DEGREE, NORM_EPS, ROPE_THETA, SIZE
from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames

EXAMPLES = ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-1.5")
MLP_RATIO = (2**-10, 2**10)
NAMES = TensorNames(
    embedding="model.transformer.wte",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    layer="model.transformer.blocks.{}.",
    attn_norm="attn_norm",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    out="attn_out",
    ff_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)
SUPPORTED = {  # fields whose other values would change the arithmetic below
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "attention_layer_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "multi_query_attention": (False,),
}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a LLaDA config.json; `CheckpointError` names the field that cannot be served."""
    checkpoint.expect_fields(SUPPORTED)
    whole, number = checkpoint.whole, checkpoint.number
    hidden, heads = whole("d_model", SIZE), whole("n_heads", SIZE)
    kv_heads = whole("n_kv_heads", SIZE, heads)
    if hidden % heads or heads % kv_heads or hidden // heads % 2:
        raise checkpoint.wrong(f"d_model {hidden}, n_heads {heads}, n_kv_heads {kv_heads} do not go together")
    vocab = whole("embedding_size", SIZE, whole("vocab_size", SIZE))
    mlp = whole("mlp_hidden_size", SIZE, mlp_by_ratio(checkpoint, hidden))
    return ModelSpec(
        architecture=checkpoint.architecture,
        vocab_size=vocab,
        layers=whole("n_layers", LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        mlp=mlp,
        groups=math.gcd(kv_heads, mlp, MAX_DEGREE),
        rope_theta=number("rope_theta", ROPE_THETA, 10000.0),
        norm_eps=number("rms_norm_eps", NORM_EPS, 1e-5),
        max_length=whole("max_sequence_length", LENGTH),
        tied=checkpoint.field("weight_tying", bool, False),
        mask_id=whole("mask_token_id", (0, vocab - 1)),
        stop_ids=checkpoint.end_ids(vocab),
        parameters=sum(math.prod(shape) for shape in checkpoint.shapes.values()),
    )


def mlp_by_ratio(checkpoint: Checkpoint, hidden: int) -> int:
    """The MLP's size where config.json states only how many times the hidden size it is."""
    size = hidden * checkpoint.number("mlp_ratio", MLP_RATIO, 4)
    if not size.is_integer() and checkpoint.config.get("mlp_hidden_size") is None:
        raise checkpoint.wrong(f"mlp_ratio times d_model must be a whole number, not {size:g}")
    return int(size)
