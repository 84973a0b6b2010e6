"""Random checkpoints in the published format of each family, tiny or of about 100 million parameters.

Their weights are scaled so that masks differ and confidences spread: several tokens reach the threshold in a step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dilaserve.models import FAMILIES, tensor_names
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.tensor_names import TensorNames

BYTES = 256  # the first token ids, one for each byte
SPECIALS = ("<|startoftext|>", "<|endoftext|>", "<|mask|>", "<|eot_id|>")  # the last ids of the vocabulary
LENGTH = 2048  # tokens of the longest canvas
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(vocab=512, hidden=64, layers=2, heads=4, kv_heads=2, mlp=128, experts=8, chosen=2, width=32),
    "100m": dict(vocab=8192, hidden=768, layers=12, heads=12, kv_heads=4, mlp=2304, experts=16, chosen=4, width=216),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
Fields = dict[str, Any]


def make(directory: Path, family: str, size: str, seed: int = 0) -> Path:
    """Write a checkpoint of a family (a key of `ARCHITECTURES`) in a size (a key of `SIZES`)."""
    sizes = SIZES[size]
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, sizes["vocab"])
    (directory / "config.json").write_text(json.dumps(config_of(family, sizes)))
    file = directory / "model.safetensors"
    save_file({"none": torch.zeros(1)}, file)  # a spec can be read from a checkpoint whose tensors are still to come
    checkpoint = Checkpoint(directory)
    family_of = FAMILIES[checkpoint.architecture]
    shapes = tensor_names.tensors(family_of.describe(checkpoint), family_of.names)
    torch.manual_seed(seed)
    save_file({name: tensor_of(name, shape, family_of.names, sizes) for name, shape in shapes.items()}, file)
    return directory


def tensor_of(name: str, shape: tuple[int, ...], names: TensorNames, sizes: dict[str, int]) -> torch.Tensor:
    """Random weights, scaled by what the tensor is for."""
    if name.endswith("bias"):
        return torch.rand(shape) * 0.3
    if len(shape) == 1:
        return torch.rand(shape) + 0.5
    tensor = torch.randn(shape) * scale_of(name, names) * shape[1] ** -0.5
    specials = sizes["vocab"] - len(SPECIALS)
    if name == f"{names.embedding}.weight":
        tensor *= shape[1] ** 0.5
        tensor[specials:] *= 0.05
    if name == f"{names.head}.weight":
        tensor[specials:] = 0.0  # no answer ends by chance
    return tensor


def scale_of(name: str, names: TensorNames) -> float:
    if name == f"{names.head}.weight":
        return 12.0
    scales = {names.q: 2.5, names.k: 2.5, names.qkv: 2.0, names.out: 2.0, names.down: 2.0, names.router: 2.0}
    return next((scale for part, scale in scales.items() if part and name.endswith(f".{part}.weight")), 1.0)


def write_tokenizer(directory: Path, vocab: int) -> None:
    """One token a byte, then made-up words, then the special ones."""
    first = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(BYTES, vocab - len(SPECIALS)))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(first)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))


def config_of(family: str, sizes: dict[str, int]) -> Fields:
    """The fields of config.json as the family publishes them."""
    architecture, fields = ARCHITECTURES[family]
    end = sizes["vocab"] - len(SPECIALS) + SPECIALS.index("<|endoftext|>")
    found: Fields = dict(architectures=[architecture], eos_token_id=end, mask_token_id=end + 1, pad_token_id=end)
    shared = llada_fields if family == "llada" else llama_fields
    found |= dict(rope_theta=1e6, rms_norm_eps=1e-6) | shared(sizes) | fields(sizes)
    return {name: value for name, value in found.items() if value is not None}


def llama_fields(sizes: dict[str, int]) -> Fields:
    return dict(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        max_position_embeddings=LENGTH,
        hidden_act="silu",
        tie_word_embeddings=False,
    )


def llada_fields(sizes: dict[str, int]) -> Fields:
    return dict(
        vocab_size=sizes["vocab"],
        embedding_size=sizes["vocab"],
        d_model=sizes["hidden"],
        n_layers=sizes["layers"],
        n_heads=sizes["heads"],
        n_kv_heads=sizes["heads"],
        mlp_hidden_size=sizes["mlp"],
        max_sequence_length=LENGTH,
        rope=True,
        layer_norm_type="rms",
        activation_type="silu",
        block_type="llama",
        weight_tying=False,
    )


def routed(sizes: dict[str, int]) -> Fields:
    return dict(num_experts=sizes["experts"], num_experts_per_tok=sizes["chosen"])


ARCHITECTURES = {  # by the name on the command line: the architecture, and its own fields
    "llada": ("LLaDAModelLM", lambda sizes: dict(model_type="llada", rope_theta=5e5)),
    "llada-moe": (
        "LLaDAMoEModelLM",
        lambda sizes: dict(
            model_type="llada",
            **routed(sizes),
            expert_intermediate_size=sizes["width"],
            dense_intermediate_size=sizes["mlp"],
            intermediate_size=None,
            moe_layer_freq=[1] * sizes["layers"],
            qk_layernorm=True,
            moe_router_score_function="softmax",
            moe_router_enable_expert_bias=False,
        ),
    ),
    "dream": ("DreamModel", lambda sizes: dict(model_type="Dream", head_dim=None)),
    "sdar": ("SDARForCausalLM", lambda sizes: dict(model_type="sdar", block_size=4)),
    "sdar-moe": (
        "SDARMoeForCausalLM",
        lambda sizes: dict(
            model_type="sdar_moe",
            block_size=4,
            **routed(sizes),
            moe_intermediate_size=sizes["width"],
            norm_topk_prob=True,
            mlp_only_layers=[],
            decoder_sparse_step=1,
        ),
    ),
    "nemotron": (
        "NemotronLabsDiffusionModel",
        lambda sizes: dict(model_type="nemotron_labs_diffusion", rope_theta=None, rope_parameters=YARN, block_size=32),
    ),
    "fast-dllm-v2": ("Fast_dLLM_QwenForCausalLM", lambda sizes: dict(model_type="Fast_dLLM_Qwen", bd_size=32)),
    "llada2": (
        "LLaDA2MoeModelLM",
        lambda sizes: dict(
            model_type="llada2_moe",
            **routed(sizes),
            moe_intermediate_size=sizes["width"],
            num_shared_experts=1,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            moe_router_enable_expert_bias=True,
            score_function="sigmoid",
            router_dtype="fp32",
            partial_rotary_factor=0.5,
            use_qk_norm=True,
            norm_topk_prob=True,
        ),
    ),
    "a2d": ("A2DQwen3LMHeadModel", lambda sizes: dict(model_type="a2d-qwen3")),
}
