"""Published names and shapes of the tensors of the transformer that all families share. Imports no torch, so that a
checkpoint can be described without it.
"""

from typing import NamedTuple

from dilaserve.models.spec import ModelSpec


class TensorNames(NamedTuple):
    """Published names: of tensors outside the layers whole, of those in layer n behind `layer` with n in its braces.

    The defaults are those of Llama, Qwen2 and Qwen3 in transformers.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    attn_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None  # one tensor of all q heads, all k heads and all v heads, in place of the three
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    ff_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_bias: str = "mlp.gate.expert_bias"  # the whole name
    expert: str = "mlp.experts.{}."  # before the names of `MLP`
    shared: str = "mlp.shared_experts."  # likewise


MLP = ("gate_proj", "up_proj", "down_proj")  # of an expert, in all families


def tensors(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Every published tensor name with its shape."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{names.embedding}.weight": (spec.vocab_size, spec.hidden),
        f"{names.norm}.weight": (spec.hidden,),
    }
    if not spec.tied:
        shapes[f"{names.head}.weight"] = (spec.vocab_size, spec.hidden)
    for i in range(spec.layers):
        layer = attention_tensors(spec, names) | mlp_tensors(spec, names, i)
        shapes |= {names.layer.format(i) + name: shape for name, shape in layer.items()}
    return shapes


def attention_tensors(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer without its MLP."""
    d, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = {names.q: (q, d), names.k: (kv, d), names.v: (kv, d)}
    if names.qkv is not None:
        projections = {names.qkv: (q + 2 * kv, d)}
    weights: dict[str, tuple[int, ...]] = {names.attn_norm: (d,), names.ff_norm: (d,), names.out: (d, q), **projections}
    if spec.qk_norm:
        weights |= {names.q_norm: (spec.head_dim,), names.k_norm: (spec.head_dim,)}
    biases = {f"{name}.bias": shape[:1] for name, shape in projections.items()} if spec.qkv_bias else {}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def mlp_tensors(spec: ModelSpec, names: TensorNames, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the MLP or the experts of one layer."""
    d, width, experts = spec.hidden, spec.mlp_of(layer), spec.experts_of(layer)
    shapes: dict[str, tuple[int, ...]] = {}
    if width:
        gate, up, down = mlp_names(spec, names, layer)
        shapes |= {f"{gate}.weight": (width, d), f"{up}.weight": (width, d), f"{down}.weight": (d, width)}
    if experts is None:
        return shapes
    shapes[f"{names.router}.weight"] = (experts.count, d)
    if experts.bias:
        shapes[names.expert_bias] = (experts.count,)
    one = dict(zip(MLP, ((experts.width, d), (experts.width, d), (d, experts.width)), strict=True))
    for expert in range(experts.count):
        shapes |= {f"{names.expert.format(expert)}{name}.weight": shape for name, shape in one.items()}
    return shapes


def mlp_names(spec: ModelSpec, names: TensorNames, layer: int) -> tuple[str, ...]:
    """Gate, up and down of the MLP that all tokens of a layer go through."""
    if spec.experts_of(layer) is None:
        return names.gate, names.up, names.down
    return tuple(names.shared + name for name in MLP)
