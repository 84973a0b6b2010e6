"""Tiny random checkpoints in the published format, made so that they tell positions and confidences apart."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
BOS, EOS, MASK, EOT = 256, 257, 258, 259
VOCAB = 272
TEMPLATE = (
    "<|startoftext|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def make(directory: Path, *, seed=0, layers=2, width=32, heads=4, kv_heads=None, mlp=64, length=256, shards=1) -> Path:
    """Write a checkpoint; see the reference for what the scalings are for: without them every mask looks alike."""
    directory.mkdir(parents=True, exist_ok=True)
    kv_heads = kv_heads or heads
    torch.manual_seed(seed)

    def random(*shape, scale=1.0):
        return torch.randn(shape) * scale * shape[-1] ** -0.5

    kv = width // heads * kv_heads
    tensors = {"wte": random(VOCAB, width, scale=width**0.5), "ff_out": random(VOCAB, width, scale=6.0)}
    tensors["wte"][MASK] *= 0.05
    tensors["ff_out"][MASK] = 0.0
    tensors["ff_out"][EOS:] = 0.0  # never end by chance; a test that wants an end makes its own
    tensors["ln_f"] = torch.ones(width)
    for i in range(layers):
        block = {
            "attn_norm": torch.ones(width),
            "ff_norm": torch.ones(width),
            "q_proj": random(width, width, scale=2.5),
            "k_proj": random(kv, width, scale=2.5),
            "v_proj": random(kv, width),
            "attn_out": random(width, width, scale=2.0),
            "ff_proj": random(mlp, width),
            "up_proj": random(mlp, width),
            "ff_out": random(width, mlp),
        }
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    save(directory, {f"model.transformer.{name}.weight": tensor for name, tensor in tensors.items()}, shards)
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "mlp_hidden_size": mlp,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "max_sequence_length": length,
        "rope": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "block_type": "llama",
        "weight_tying": False,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory


def save(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_tokenizer(directory: Path, first_special=256, specials=SPECIALS) -> None:
    """Byte-level: one token a byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fill = [f"<|unused{i}|>" for i in range(256, first_special)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*fill, *specials)])
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
