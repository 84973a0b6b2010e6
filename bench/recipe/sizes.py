"""The bundled model's shape."""

from typing import Any

VOCAB, WIDTH, LAYERS, HEADS, MLP = 768, 256, 5, 4, 640
MAX_LENGTH, THETA, EPS = 1024, 10000.0, 1e-5
BLOCK = 32


def config(mask: int, end: int) -> dict[str, Any]:
    """config.json, under LLaDA's published names."""
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
        "mask_token_id": mask,
        "eos_token_id": end,
        "pad_token_id": end,
    }
