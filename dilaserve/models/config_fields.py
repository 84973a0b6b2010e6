"""Fields of config.json that families share, as transformers names them, and the bounds of their values."""

import math

from dilaserve.models.checkpoint import Checkpoint, shown
from dilaserve.models.spec import Experts, ModelSpec, QueryScale, Yarn

MAX_DEGREE = 8  # devices of a tensor-parallel group
SIZE = (1, 2**24)  # of a dimension, in elements
LAYERS = (1, 1024)
YARN = (1e-6, 1e6)  # of its numbers
TOKEN_ID = (0, 2**24)
BLOCK = (1, 1024)  # tokens
EXPERTS = (1, 1024)  # of a layer
LENGTH = (2, 2**24)  # of a canvas, in tokens
ROPE_THETA = (1.0, 1e12)  # below, angles grow with the frequency's number until they overflow
NORM_EPS = (1e-20, 1.0)  # below, a row of zeros may become NaN; above, it outweighs the row
SUPPORTED = {  # fields whose other values would change the arithmetic of `transformer`
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
}


def llama_spec(
    checkpoint: Checkpoint,
    mask_id: int,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    yarn: bool = False,
    experts: Experts | None = None,
    mlp_field: str = "intermediate_size",
) -> ModelSpec:
    """The spec of a checkpoint with Llama's field names; `CheckpointError` names the field that cannot be served.

    `yarn`: positions are rotated as `rope_parameters` say, else as they are.
    """
    checkpoint.expect_fields(SUPPORTED)
    if not yarn:
        check_rope(checkpoint)
    whole, number = checkpoint.whole, checkpoint.number
    hidden, heads = whole("hidden_size", SIZE), whole("num_attention_heads", SIZE)
    kv_heads = whole("num_key_value_heads", SIZE, heads)
    if checkpoint.config.get("head_dim") is None and hidden % heads:
        raise checkpoint.wrong(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = whole("head_dim", SIZE, hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise checkpoint.wrong(
            f"num_attention_heads {heads}, num_key_value_heads {kv_heads}, head_dim {head_dim} do not go together"
        )
    vocab = whole("vocab_size", SIZE)
    layers = whole("num_hidden_layers", LAYERS)
    mlp = whole(mlp_field, SIZE) if experts is None or experts.dense else 0
    if not 0 <= mask_id < vocab:
        raise checkpoint.wrong(f"the mask token {mask_id} does not lie between 0 and {vocab - 1}")
    return ModelSpec(
        architecture=checkpoint.architecture,
        vocab_size=vocab,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        groups=math.gcd(kv_heads, mlp, *((experts.count, experts.shared) if experts else ()), MAX_DEGREE),
        rope_theta=rope_theta(checkpoint),
        norm_eps=number("rms_norm_eps", NORM_EPS, 1e-6),
        max_length=whole("max_position_embeddings", LENGTH),
        tied=checkpoint.field("tie_word_embeddings", bool, False),
        mask_id=mask_id,
        stop_ids=checkpoint.end_ids(vocab),
        parameters=sum(math.prod(shape) for shape in checkpoint.shapes.values()),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        yarn=yarn_of(checkpoint) if yarn else None,
        query_scale=query_scale_of(checkpoint) if yarn else None,
        experts=experts,
    )


def expert_counts(
    checkpoint: Checkpoint, count: str = "num_experts", per_token: str = "num_experts_per_tok"
) -> tuple[int, int]:
    """Experts of a layer, and those of a token."""
    experts = checkpoint.whole(count, EXPERTS)
    return experts, checkpoint.whole(per_token, (1, experts))


def mask_token(checkpoint: Checkpoint, text: str) -> int:
    """`mask_token_id`, or where config.json has none the id of the token `text` that was added to the tokenizer."""
    if checkpoint.config.get("mask_token_id") is None:
        return checkpoint.added_token(text)
    return checkpoint.whole("mask_token_id", TOKEN_ID)


def rope_theta(checkpoint: Checkpoint) -> float:
    """`rope_theta`, which newer files keep in `rope_parameters`."""
    nested = checkpoint.field("rope_parameters", dict, {}).get("rope_theta")
    return checkpoint.number("rope_theta", ROPE_THETA, 10000.0 if nested is None else nested)


def yarn_of(checkpoint: Checkpoint) -> Yarn | None:
    """`rope_parameters` of the kind yarn; None for the default kind."""
    fields = checkpoint.part("rope_parameters")
    kind = fields.config.get("rope_type", fields.config.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise checkpoint.wrong(f"rope_parameters of the type {shown(kind)} are not supported, only yarn and default")
    factor = fields.number("factor", YARN)
    return Yarn(
        factor=factor,
        original_length=fields.whole("original_max_position_embeddings", LENGTH),
        beta_fast=fields.number("beta_fast", YARN, 32.0),
        beta_slow=fields.number("beta_slow", YARN, 1.0),
        magnitude=magnitude(factor, fields.number("mscale", YARN, 1.0))
        / magnitude(factor, fields.number("mscale_all_dim", YARN, 1.0)),
    )


def magnitude(factor: float, scale: float) -> float:
    """YaRN's factor on cosines and sines (arXiv 2309.00071, equation 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def query_scale_of(checkpoint: Checkpoint) -> QueryScale | None:
    """`llama_4_scaling_beta` of `rope_parameters`, if it is there."""
    fields = checkpoint.part("rope_parameters")
    if fields.config.get("llama_4_scaling_beta") is None:
        return None
    return QueryScale(
        beta=fields.number("llama_4_scaling_beta", (0.0, 100.0)),
        length=fields.whole("original_max_position_embeddings", LENGTH),
    )


def check_rope(checkpoint: Checkpoint) -> None:
    """Positions are rotated as they are: no scaling of any kind."""
    for name in ("rope_scaling", "rope_parameters"):
        scaling = checkpoint.field(name, dict, {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default" or scaling.get("factor", 1.0) not in (1, None):
            raise checkpoint.wrong(f"{name} {shown(scaling)} is not supported, only the default")
