"""Weights between the trained network and a checkpoint under LLaDA's published names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dilaserve.models.checkpoint import locate
from training.network import EPS, HEADS, LAYERS, MAX_LENGTH, MLP, THETA, VOCAB, WIDTH
from training.tokenizer import EOS, MASK, SPECIALS, TEMPLATE, tokenizer


def stacked(model: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, stacked as `Net` has them."""
    tensors, root = load_file(locate(model) / "model.safetensors"), "model.transformer."

    def each(*names: str) -> torch.Tensor:
        found = [tensors[f"{root}blocks.{i}.{name}.weight"] for i in range(LAYERS) for name in names]
        return torch.stack(found).float()

    norms = torch.cat([each("attn_norm", "ff_norm"), tensors[root + "ln_f.weight"].float()[None]])
    return {
        "embedding": tensors[root + "wte.weight"].float(),
        "head": tensors[root + "ff_out.weight"].float(),
        "norms": norms,
        "qkv": each("q_proj", "k_proj", "v_proj"),
        "out": each("attn_out"),
        "gate_up": each("ff_proj", "up_proj"),
        "down": each("ff_out"),
    }


def export(weights: dict[str, torch.Tensor], out: Path) -> None:
    """Write the checkpoint under the published names, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    root, tensors = "model.transformer.", {}
    tensors[root + "wte.weight"], tensors[root + "ff_out.weight"] = weights["embedding"], weights["head"]
    tensors[root + "ln_f.weight"] = weights["norms"][-1]
    for i in range(LAYERS):
        names = ("q_proj", "k_proj", "v_proj")
        block = {name: weights["qkv"][3 * i + j] for j, name in enumerate(names)}
        block |= {"attn_out": weights["out"][i], "ff_out": weights["down"][i]}
        block |= {"ff_proj": weights["gate_up"][2 * i], "up_proj": weights["gate_up"][2 * i + 1]}
        block |= {"attn_norm": weights["norms"][2 * i], "ff_norm": weights["norms"][2 * i + 1]}
        tensors |= {f"{root}blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    plain = {name: tensor.detach().to(torch.bfloat16).cpu().contiguous().clone() for name, tensor in tensors.items()}
    temporary = out / "model.safetensors.new"
    save_file(plain, temporary, metadata={"format": "pt"})
    temporary.rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    tokenizer().save(str(out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[1],
        "mask_token": SPECIALS[2],
        "model_max_length": MAX_LENGTH,
        "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def config() -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "mlp_hidden_size": MLP,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "max_sequence_length": MAX_LENGTH,
        "rope": True,
        "rope_theta": THETA,
        "rope_full_precision": True,
        "rms_norm_eps": EPS,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "activation_type": "silu",
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "attention_layer_norm": False,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
