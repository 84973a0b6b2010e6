"""A reference forward pass with an explicit mask: all tokens at once, nothing kept, nothing shared with the engine.

It knows the layers of Qwen2, Qwen3 and Ministral-3 by the published tensor names. A test holds its logits beside those
of transformers.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


class Masked:
    """One checkpoint in float32; `logits` says what each token sees."""

    def __init__(self, directory: Path) -> None:
        self.answers: dict[tuple[str, str], tuple[list[int], int]] = {}  # by loop and its arguments
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
        self.mask_id = self.config.get("mask_token_id", 151665)
        self.root = "encoder" if "encoder.norm.weight" in self.weights else "model"
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        self.rope = self.config.get("rope_parameters") or {"rope_theta": self.config["rope_theta"]}

    def w(self, name: str) -> torch.Tensor:
        return self.weights[f"{self.root}.{name}.weight"]

    def linear(self, x, name):
        bias = self.weights.get(f"{self.root}.{name}.bias")
        return x @ self.w(name).T + (0.0 if bias is None else bias)

    def norm(self, x, name):
        if f"{self.root}.{name}.weight" not in self.weights:
            return x  # queries and keys of families that do not norm them
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.w(name)

    def frequencies(self) -> torch.Tensor:
        """Of each pair of dimensions, [head_dim / 2]; YaRN's (arXiv 2309.00071) where rope_parameters say so."""
        size, theta = self.head_dim, self.rope["rope_theta"]
        plain = theta ** (-torch.arange(size // 2).float() * 2 / size)
        if self.rope.get("rope_type") != "yarn":
            return plain

        def dimension(turns):
            return (
                size
                * math.log(self.rope["original_max_position_embeddings"] / (2 * math.pi * turns))
                / (2 * math.log(theta))
            )

        low = max(math.floor(dimension(self.rope["beta_fast"])), 0)
        high = min(math.ceil(dimension(self.rope["beta_slow"])), size - 1)
        ramp = ((torch.arange(size // 2).float() - low) / (high - low or 0.001)).clamp(0, 1)
        return plain * (1 - ramp) + plain / self.rope["factor"] * ramp

    def rotate(self, x, positions):
        """NeoX halves; x is [heads, tokens, head_dim]."""
        half, angle = self.head_dim // 2, torch.outer(positions.float(), self.frequencies())
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def query_scale(self, positions):
        """Ministral-3's factor on rotated queries, [tokens, 1]."""
        if self.rope.get("llama_4_scaling_beta") is None:
            return 1.0
        far = torch.floor(positions / self.rope["original_max_position_embeddings"])
        return (1 + self.rope["llama_4_scaling_beta"] * torch.log(1 + far))[:, None]

    def attention(self, h, name, visible, positions):
        q, k, v = (
            self.linear(h, f"{name}self_attn.{part}_proj").view(len(h), -1, self.head_dim).transpose(0, 1)
            for part in "qkv"
        )
        q, k = self.norm(q, name + "self_attn.q_norm"), self.norm(k, name + "self_attn.k_norm")
        q, k = self.rotate(q, positions) * self.query_scale(positions), self.rotate(k, positions)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) / self.head_dim**0.5).masked_fill(~visible, -torch.inf)
        return self.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), name + "self_attn.o_proj")

    @torch.no_grad()
    def logits(self, ids: list[int], visible: torch.Tensor, positions: list[int] | None = None) -> torch.Tensor:
        """[tokens, vocabulary]; `visible` [tokens, tokens] is true where a query (row) sees a key (column)."""
        at = torch.tensor(range(len(ids)) if positions is None else positions)
        x = self.w("embed_tokens")[torch.tensor(ids)]
        for i in range(self.config["num_hidden_layers"]):
            name = f"layers.{i}."
            x = x + self.attention(self.norm(x, name + "input_layernorm"), name, visible, at)
            h = self.norm(x, name + "post_attention_layernorm")
            gate = torch.nn.functional.silu(self.linear(h, name + "mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
        heads = [self.weights[name] for name in ("lm_head.weight", "diffusion_head.weight") if name in self.weights]
        return self.norm(x, "norm") @ (heads or [self.w("embed_tokens")])[0].T
