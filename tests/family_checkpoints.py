"""Tiny random checkpoints of families whose layers transformers has, and a reference model of its own.

The backbone and its published tensor names are transformers' own. Its modules are imported when they are wanted: they
import Triton, which `test_kernels` must be the first to do. The reference for cached decoding is `LlamaLike`, whose
logits a test holds beside the backbone's with an open attention mask.
"""

import json
from pathlib import Path

import checkpoints
import torch
import transformers
from safetensors.torch import load_file, save_file

MOE = dict(head_dim=8, intermediate_size=64, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
FAMILIES = {  # architecture: backbone, config, fields that its files have otherwise
    "ILLaDAForCausalLM": ("Llama", dict(tie_word_embeddings=True), dict(model_type="illada", head_dim=None)),
    "A2DQwen3LMHeadModel": ("Qwen3", dict(head_dim=24, tie_word_embeddings=True), dict(model_type="a2d-qwen3")),
    "A2DQwen2LMHeadModel": ("Qwen2", dict(tie_word_embeddings=False), dict(model_type="a2d-qwen2")),
    "LLaDAMoEModelLM": (
        "Qwen3Moe",
        MOE | dict(mlp_only_layers=[0], norm_topk_prob=False),
        dict(
            model_type="llada",
            num_experts=8,
            num_local_experts=None,
            expert_intermediate_size=24,
            moe_intermediate_size=None,
            dense_intermediate_size=64,
            intermediate_size=None,
            shared_expert_intermediate_size=None,
            moe_layer_freq=[0, 1],
            mlp_only_layers=None,
            decoder_sparse_step=None,
            qk_layernorm=True,
            moe_router_score_function="softmax",
            moe_router_enable_expert_bias=False,
            clip_qkv=None,
        ),
    ),
    "A2DLlamaLMHeadModel": ("Llama", dict(tie_word_embeddings=False), dict(model_type="a2d-llama")),
}
BLOCKWISE = {  # the same for families whose attention is block-causal
    "SDARForCausalLM": ("Qwen3", dict(head_dim=24), dict(model_type="sdar", mask_token_id=checkpoints.MASK)),
    "SDARMoeForCausalLM": (
        "Qwen3Moe",
        MOE | dict(norm_topk_prob=True, mlp_only_layers=[0]),
        dict(model_type="sdar_moe", num_experts=8, num_local_experts=None, mask_token_id=checkpoints.MASK),
    ),
    "LLaDA2MoeModelLM": (
        "Glm4Moe",  # the same layers with other names
        dict(
            head_dim=16,
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=24,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            first_k_dense_replace=1,
            use_qk_norm=True,
            rope_parameters=dict(rope_type="default", rope_theta=6e5, partial_rotary_factor=0.5),
        ),
        dict(
            model_type="llada2_moe",
            num_experts=16,
            num_shared_experts=2,
            n_routed_experts=None,
            n_shared_experts=None,
            moe_router_enable_expert_bias=True,
            score_function="sigmoid",
            router_dtype="fp32",
            partial_rotary_factor=0.5,
            rope_parameters=None,
            rope_theta=6e5,
        ),
    ),
}
RENAMED = {  # parts of names of Glm4Moe, and what LLaDA2 calls them
    "embed_tokens": "word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "gate.e_score_correction_bias": "gate.expert_bias",
}
SCALES = {"q_proj": 2.5, "k_proj": 2.5, "o_proj": 2.0, "down_proj": 2.0, "mlp.gate.": 2.0}  # of weights so named
MASK_IDS = {"ILLaDAForCausalLM": 5}  # by architecture; the others find `<|mask|>` in the tokenizer


def mask_id(architecture: str) -> int:
    return MASK_IDS.get(architecture, checkpoints.MASK)


def make(directory: Path, architecture: str, seed: int = 0, kv_heads: int = 2) -> Path:
    """Write a checkpoint of two layers in the published format."""
    backbone_of(architecture, seed, kv_heads).save_pretrained(directory)
    fields = (FAMILIES | BLOCKWISE)[architecture][2]
    written = json.loads((directory / "config.json").read_text()) | {"architectures": [architecture]} | fields
    written = {name: value for name, value in written.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(written))
    specials = [{"<|mdm_mask|>": "<|mask|>"}.get(token, token) for token in checkpoints.SPECIALS]
    checkpoints.write_tokenizer(directory, specials=specials)
    return directory


def backbone_of(architecture: str, seed: int = 0, kv_heads: int = 2) -> torch.nn.Module:
    """transformers' model with random weights, which are scaled so that masks differ and confidences spread."""
    backbone, special, _ = (FAMILIES | BLOCKWISE)[architecture]
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=checkpoints.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        eos_token_id=checkpoints.EOS,
    )
    config = getattr(transformers, f"{backbone}Config")(**sizes | special)
    model = getattr(transformers, f"{backbone}ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0.0, 0.3)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            else:
                scale = next((scale for part, scale in SCALES.items() if part in name), 1.0)
                tensor.normal_(0.0, scale * tensor.shape[-1] ** -0.5)
        for name, tensor in model.named_buffers():
            if name.endswith("correction_bias"):
                tensor.uniform_(0.0, 0.3)
        embedding, mask = model.get_input_embeddings().weight, mask_id(architecture)
        embedding.mul_(32**0.5 if model.lm_head.weight is not embedding else 2.0)
        embedding[mask] *= 0.05
        if model.lm_head.weight is not embedding:
            model.lm_head.weight.mul_(6.0)
            model.lm_head.weight[[mask, *range(checkpoints.EOS, checkpoints.VOCAB)]] = 0.0
        else:
            embedding[[*range(checkpoints.EOS, checkpoints.VOCAB)]] *= 0.05
    return model


def published(directory, architecture):
    """A checkpoint in the format of its family."""
    make(directory, architecture)
    if architecture != "LLaDA2MoeModelLM":
        return directory
    tensors = load_file(directory / "model.safetensors")
    for i in range(2):
        parts = [tensors.pop(f"model.layers.{i}.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"model.layers.{i}.attention.query_key_value.weight"] = torch.cat(parts)
    for old, new in RENAMED.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def backbone_logits(directory: Path, architecture: str, ids: list[int]) -> torch.Tensor:
    """Logits of transformers' own layers, every position of which sees every other."""
    backbone, special, _ = FAMILIES[architecture]
    config = getattr(transformers, f"{backbone}Config").from_pretrained(directory, **special)
    config.model_type = type(config).model_type  # by which tensors are renamed
    model = getattr(transformers, f"{backbone}ForCausalLM").from_pretrained(
        directory, config=config, attn_implementation="eager"
    )
    return open_logits(model, ids)


def open_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    open_mask = torch.zeros(1, 1, len(ids), len(ids))
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=open_mask).logits[0]


class LlamaLike:
    """The plain forward pass of Llama, Qwen2 and Qwen3 without a causal mask; K/V are kept before the rotation."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.weights = load_file(directory / "model.safetensors")
        self.mask_id = mask_id(config["architectures"][0])
        self.layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.chosen = config.get("num_experts_per_tok")
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

    def linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, x, name):
        if f"{name}.weight" not in self.weights:
            return x  # queries and keys of families that do not norm them
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weights[f"{name}.weight"]

    def split(self, x, heads):
        return x.view(-1, heads, self.head_dim).transpose(0, 1)

    def rotate(self, x, start):
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half).float() * 2 / self.head_dim)
        angle = torch.outer(torch.arange(start, start + x.shape[1]).float(), frequency)
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def mlp(self, x, name):
        gate = torch.nn.functional.silu(self.linear(x, name + "gate_proj"))
        return self.linear(gate * self.linear(x, name + "up_proj"), name + "down_proj")

    def feed_forward(self, x, name):
        """The dense MLP, or each token's best experts by a softmax over all, one token after the other."""
        if f"{name}mlp.gate.weight" not in self.weights:
            return self.mlp(x, name + "mlp.")
        odds = self.linear(x, name + "mlp.gate").softmax(-1) + self.weights.get(f"{name}mlp.expert_bias", 0.0)
        mixed = torch.zeros_like(x)
        for token, chances in enumerate(odds):
            for expert in sorted(chances.argsort(descending=True)[: self.chosen].tolist()):
                mixed[token] += chances[expert] * self.mlp(x[token], f"{name}mlp.experts.{expert}.")
        return (
            mixed + self.mlp(x, name + "shared_expert.")
            if f"{name}shared_expert.up_proj.weight" in self.weights
            else mixed
        )

    @torch.no_grad()
    def forward(self, ids, cache=None, start=0, mode="append"):
        """See `Llada.forward`."""
        embedding = self.weights["model.embed_tokens.weight"]
        x, kept = embedding[torch.tensor(ids)], []
        for i in range(self.layers):
            name = f"model.layers.{i}."
            h = self.norm(x, name + "input_layernorm")
            q, k, v = (
                self.split(self.linear(h, f"{name}self_attn.{part}_proj"), heads)
                for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
            )
            q, k = self.norm(q, name + "self_attn.q_norm"), self.norm(k, name + "self_attn.k_norm")
            if cache is not None:
                behind = cache[i][0].shape[1] if mode == "append" else start + len(ids)
                k, v = (
                    torch.cat([old[:, :start], new, old[:, behind:]], 1)
                    for old, new in zip(cache[i], (k, v), strict=True)
                )
            kept.append((k, v))
            share = self.heads // self.kv_heads
            keys, values = self.rotate(k, 0).repeat_interleave(share, 0), v.repeat_interleave(share, 0)
            scores = self.rotate(q, start) @ keys.transpose(1, 2) / self.head_dim**0.5
            x = x + self.linear((scores.softmax(-1) @ values).transpose(0, 1).flatten(1), name + "self_attn.o_proj")
            h = self.norm(x, name + "post_attention_layernorm")
            x = x + self.feed_forward(h, name)
        head = self.weights.get("lm_head.weight", embedding)
        return self.norm(x, "model.norm") @ head.T, kept
