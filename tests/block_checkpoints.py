"""Tiny random checkpoints of Dream, SDAR, Nemotron-Labs-Diffusion and Fast-dLLM v2, in their published formats.

Their weights are scaled so that masks differ and confidences spread. `transformers_logits` are those of transformers'
own layers under the mask that the caller gives.
"""

import json
from pathlib import Path

import checkpoints
import torch
import transformers
from safetensors.torch import load_file, save_file

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
FAMILIES = {  # architecture: the backbone in transformers, and fields beside those that all have
    "DreamModel": ("Qwen2", dict(model_type="Dream", rope_theta=1e6)),
    "SDARForCausalLM": ("Qwen3", dict(model_type="sdar", rope_theta=1e6, head_dim=24, block_size=4)),
    "NemotronLabsDiffusionModel": (
        "Ministral3",
        dict(model_type="nemotron_labs_diffusion", head_dim=16, rope_parameters=YARN, block_size=32),
    ),
    "Fast_dLLM_QwenForCausalLM": (
        "Qwen2",
        dict(model_type="Fast_dLLM_Qwen", rope_theta=1e6, bd_size=32, tie_word_embeddings=True),
    ),
}


def make(directory: Path, architecture: str, seed: int = 0) -> Path:
    """Write a checkpoint of two layers that never ends by itself; see `checkpoints.make` for the scalings."""
    backbone, special = FAMILIES[architecture]
    config = dict(
        architectures=[architecture],
        vocab_size=checkpoints.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        tie_word_embeddings=False,
        mask_token_id=checkpoints.MASK,
        eos_token_id=checkpoints.EOS,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | special))
    model = backbone_of(directory)
    torch.manual_seed(seed)
    tensors = {name: scaled(name, tensor) for name, tensor in model.state_dict().items()}
    specials = [checkpoints.MASK, *range(checkpoints.EOS, checkpoints.VOCAB)]
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
        tensors["model.embed_tokens.weight"] *= 2.0
        tensors["model.embed_tokens.weight"][specials] *= 0.05
        tensors["model.norm.weight"] *= 3.0
    else:
        tensors["model.embed_tokens.weight"] *= 32**0.5
        tensors["model.embed_tokens.weight"][checkpoints.MASK] *= 0.05
        tensors["lm_head.weight"] *= 6.0
        tensors["lm_head.weight"][specials] = 0.0
    save_file({published(name, backbone): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    checkpoints.write_tokenizer(directory)
    return directory


def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.randn(tensor.shape) * 0.3
    if "norm" in name:
        return torch.rand(tensor.shape) + 0.5
    scale = {"q_proj": 2.5, "k_proj": 2.5, "o_proj": 2.0, "down_proj": 2.0}.get(name.split(".")[-2], 1.0)
    return torch.randn(tensor.shape) * scale * tensor.shape[1] ** -0.5


def published(name: str, backbone: str) -> str:
    if backbone != "Ministral3":
        return name
    return name.replace("model.", "encoder.").replace("lm_head.", "diffusion_head.")


def backbone_of(directory: Path):
    """transformers' layers for a checkpoint's configuration, without its weights."""
    written = json.loads((directory / "config.json").read_text())
    backbone, _ = FAMILIES[written["architectures"][0]]
    fields = {name: value for name, value in written.items() if name not in ("architectures", "model_type")}
    theta = fields.pop("rope_theta", None)
    fields.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": theta})
    config = getattr(transformers, f"{backbone}Config")(**fields, attn_implementation="eager")
    return getattr(transformers, f"{backbone}ForCausalLM")(config).eval()


def transformers_logits(directory: Path, ids: list[int], visible: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] of transformers' layers; `visible` [tokens, tokens] is true where a query sees a key."""
    model, tensors = backbone_of(directory), load_file(directory / "model.safetensors")
    if "encoder.norm.weight" in tensors:
        renamed = (("encoder.", "model."), ("diffusion_head.", "lm_head."))
        for ours, theirs in renamed:
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors)
    hidden = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=hidden, use_cache=False).logits[0]


def teach_an_end(directory: Path, factor: float = 1.2) -> None:
    """Give the end token a row of the head that often wins."""
    tensors = load_file(directory / "model.safetensors")
    names = [name for name in ("lm_head.weight", "diffusion_head.weight") if name in tensors]
    head = tensors[names[0] if names else "model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    head[checkpoints.EOS] = torch.randn(head.shape[1], generator=generator) * head[:256].std() * factor
    save_file(tensors, directory / "model.safetensors")
