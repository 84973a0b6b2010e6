"""DiffusionGemma 26B-A4B (Google, 2026): the layers of Gemma 4; finished text is causal, an open block sees all.

A block starts as random tokens, not as masks. Images are not served: the vision tower is left out.
"""

import math

import msgspec

from dilaserve.models.checkpoint import Checkpoint, shown
from dilaserve.models.config_fields import (
    BLOCK,
    LAYERS,
    LENGTH,
    MAX_DEGREE,
    NORM_EPS,
    ROPE_THETA,
    SIZE,
    expert_counts,
)
from dilaserve.models.gemma_tensor_names import tensors
from dilaserve.models.spec import Experts, FullLayers, ModelSpec, NoiseSchedule
from dilaserve.models.tensor_names import TensorNames
from dilaserve.types import FamilyTraits

EXAMPLES = ("google/diffusiongemma-26B-A4B-it",)
NAMES = TensorNames(
    embedding="model.decoder.embed_tokens",
    norm="model.decoder.norm",
    layer="model.decoder.layers.{}.",
    ff_norm="pre_feedforward_layernorm",
)
IGNORED = ("model.encoder.vision_tower.*", "model.encoder.embed_vision.*")
FULL, SLIDING = "full_attention", "sliding_attention"
SAMPLER = "EntropyBoundSamplerConfig"
PATTERN = 6  # every so many layers one sees all
STEPS = (1, 4096)
TEMPERATURE = (1e-3, 1e3)
SHARE = (0.0, 1.0)  # of the dimensions of a head
POSITIVE = (1e-6, 1e6)
NOT_NEGATIVE = (0.0, 1e6)
SUPPORTED = {  # fields whose other values would change the arithmetic
    "attention_bias": (False,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": ("vision",),
    "tie_word_embeddings": (True,),
}


def describe(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a DiffusionGemma config.json; `CheckpointError` names the field that cannot be served."""
    text, kinds = checkpoint.part("text_config"), layer_kinds(checkpoint.part("text_config"))
    text.expect_fields(SUPPORTED)
    whole, (count, chosen) = text.whole, expert_counts(text, per_token="top_k_experts")
    heads, kv_heads = whole("num_attention_heads", SIZE), whole("num_key_value_heads", SIZE)
    head_dim = whole("head_dim", SIZE, 256)
    full = full_layers(text, kinds)
    if heads % kv_heads or heads % full.kv_heads or head_dim % 2 or full.head_dim % 2:
        raise text.wrong(
            f"num_attention_heads {heads}, key and value heads {kv_heads} and {full.kv_heads}, "
            f"head sizes {head_dim} and {full.head_dim} do not go together"
        )
    hidden, mlp, vocab = (whole(name, SIZE) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    noise, block = noise_schedule(checkpoint), checkpoint.whole("canvas_length", BLOCK, 256)
    spec = ModelSpec(
        architecture=checkpoint.architecture,
        vocab_size=vocab,
        layers=len(kinds),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        groups=math.gcd(kv_heads, full.kv_heads, mlp, count, MAX_DEGREE),
        rope_theta=rope(text, SLIDING, "default").number("rope_theta", ROPE_THETA, 1e4),
        norm_eps=text.number("rms_norm_eps", NORM_EPS, 1e-6),
        max_length=whole("max_position_embeddings", LENGTH),
        tied=True,
        mask_id=vocab,  # no token: it stands where a block is not finished
        stop_ids=tuple(sorted({*checkpoint.end_ids(vocab), *text.end_ids(vocab)})),
        parameters=0,
        experts=Experts(
            count=count, chosen=chosen, width=whole("moe_intermediate_size", SIZE), router="softmax-scaled"
        ),
        window=whole("sliding_window", LENGTH),
        full=full,
        softcap=text.number("final_logit_softcapping", POSITIVE, 30.0),
        unsharded=unsharded(hidden, mlp, len(kinds), count),
        noise=noise,
        traits=FamilyTraits(
            attention="causal",
            block_length=block,
            steps_per_block=True,
            noise_steps=noise.steps,
            rules=("entropy-bound",),
        ),
    )
    return msgspec.structs.replace(spec, parameters=sum(map(math.prod, tensors(spec, NAMES).values())))


def unsharded(hidden: int, mlp: int, layers: int, experts: int) -> int:
    """Parameters that every shard holds whole, beside those of all families: self-conditioning, more norms, factors."""
    return hidden + 3 * hidden * mlp + layers * (6 * hidden + experts + 2)


def layer_kinds(text: Checkpoint) -> list[str]:
    """`layer_types`; the last layer sees all, as transformers has it. Without the field each sixth layer does."""
    layers = text.whole("num_hidden_layers", LAYERS)
    usual = [FULL if (i + 1) % PATTERN == 0 else SLIDING for i in range(layers)]
    kinds = text.field("layer_types", list, usual)
    if len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise text.wrong(f"layer_types must be {FULL} or {SLIDING} for each of {layers} layers, not {shown(kinds)}")
    return [*kinds[:-1], FULL]


def full_layers(text: Checkpoint, kinds: list[str]) -> FullLayers:
    """The layers that see all. Their heads' shape is stated once, or as transformers saves it by layer."""
    layers = tuple(i for i, kind in enumerate(kinds) if kind == FULL)
    shapes = text.part("per_layer_config")
    one = shapes.part(str(layers[-1])) if shapes.config else text
    names = ("num_key_value_heads", "head_dim") if shapes.config else ("num_global_key_value_heads", "global_head_dim")
    if shapes.config and any(shapes.part(str(layer)).config != one.config for layer in layers):
        raise text.wrong("per_layer_config has layers of different shapes, which are not supported")
    head_dim = one.whole(names[1], SIZE, 512)
    angles = rope(text, FULL, "proportional")
    return FullLayers(
        layers=layers,
        kv_heads=one.whole(names[0], SIZE, text.whole("num_key_value_heads", SIZE)),
        head_dim=head_dim,
        rope_theta=angles.number("rope_theta", ROPE_THETA, 1e6),
        rotary=2 * int(angles.number("partial_rotary_factor", SHARE, 0.25) * head_dim // 2),
    )


def rope(text: Checkpoint, kind: str, expected: str) -> Checkpoint:
    """The rotation of one kind of layers, after checking that it is of the type `expected`."""
    fields = text.part("rope_parameters").part(kind)
    supported: dict[str, tuple[object, ...]] = {"rope_type": (expected,), "factor": (1.0,)}
    fields.expect_fields(supported if kind == FULL else supported | {"partial_rotary_factor": (1.0,)})
    return fields


def noise_schedule(checkpoint: Checkpoint) -> NoiseSchedule:
    """The sampler of generation_config.json; what it leaves out is as the authors published it."""
    fields = checkpoint.generation()
    sampler = fields.part("sampler_config")
    if sampler.config.get("_cls_name", SAMPLER) != SAMPLER:
        raise fields.wrong(f"sampler_config {shown(sampler.config)} is not supported, only {SAMPLER}")
    return NoiseSchedule(
        steps=fields.whole("max_denoising_steps", STEPS, 48),
        coldest=fields.number("t_min", TEMPERATURE, 0.4),
        hottest=fields.number("t_max", TEMPERATURE, 0.8),
        entropy_bound=sampler.number("entropy_bound", NOT_NEGATIVE, 0.1),
        stable_steps=fields.whole("stability_threshold", (0, STEPS[1]), 1),
        mean_entropy=fields.number("confidence_threshold", NOT_NEGATIVE, 0.005),
    )
