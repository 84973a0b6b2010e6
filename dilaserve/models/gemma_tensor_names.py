"""What the tensors of DiffusionGemma are called in its checkpoints, and their shapes; nothing here knows torch."""

from dilaserve.models.spec import ModelSpec
from dilaserve.models.tensor_names import TensorNames

NORMS = (  # beside `attn_norm` and `ff_norm` of `TensorNames`
    "post_attention_layernorm",
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
    "post_feedforward_layernorm",
)
CONDITIONING = "model.decoder.self_conditioning."
ENCODER = "model.encoder.language_model.layers.{}."


def tensors(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Every published tensor name with its shape."""
    d, width = spec.hidden, spec.mlp
    shapes: dict[str, tuple[int, ...]] = {
        f"{names.embedding}.weight": (spec.vocab_size, d),
        f"{names.norm}.weight": (d,),
        f"{CONDITIONING}pre_norm.weight": (d,),
        f"{CONDITIONING}gate_proj.weight": (width, d),
        f"{CONDITIONING}up_proj.weight": (width, d),
        f"{CONDITIONING}down_proj.weight": (d, width),
    }
    for i in range(spec.layers):
        layer = attention_tensors(spec, names, i) | feed_forward_tensors(spec, names)
        shapes |= {names.layer.format(i) + name: shape for name, shape in layer.items()}
        shapes[ENCODER.format(i) + "layer_scalar"] = (1,)
    return shapes


def attention_tensors(spec: ModelSpec, names: TensorNames, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's attention; layers that see all have no projection for values."""
    d, (kv_heads, head_dim) = spec.hidden, spec.kv_shape(layer)
    q, kv = spec.heads * head_dim, kv_heads * head_dim
    values = {} if spec.is_full(layer) else {f"{names.v}.weight": (kv, d)}
    return values | {
        f"{names.attn_norm}.weight": (d,),
        f"{names.q}.weight": (q, d),
        f"{names.k}.weight": (kv, d),
        f"{names.out}.weight": (d, q),
        f"{names.q_norm}.weight": (head_dim,),
        f"{names.k_norm}.weight": (head_dim,),
    }


def feed_forward_tensors(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer without its attention."""
    d, experts = spec.hidden, spec.experts
    assert experts is not None
    return {
        "layer_scalar": (1,),
        f"{names.ff_norm}.weight": (d,),
        **{f"{name}.weight": (d,) for name in NORMS},
        f"{names.gate}.weight": (spec.mlp, d),
        f"{names.up}.weight": (spec.mlp, d),
        f"{names.down}.weight": (d, spec.mlp),
        "router.proj.weight": (experts.count, d),
        "router.scale": (d,),
        "router.per_expert_scale": (experts.count,),
        "experts.gate_up_proj": (experts.count, 2 * experts.width, d),
        "experts.down_proj": (experts.count, d, experts.width),
    }
