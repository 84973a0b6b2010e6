"""LLaDA's forward pass for training, with the weights of all layers stacked by shape, and its checkpoint files."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dilaserve.models.checkpoint import locate
from recipe.sizes import EPS, HEADS, LAYERS, MAX_LENGTH, MLP, THETA, VOCAB, WIDTH, config
from recipe.vocabulary import EOS, MASK, SPECIALS, TEMPLATE, tokenizer

ROOT = "model.transformer."


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        scale = WIDTH**-0.5
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.5)
        self.head = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.02)
        self.norms = torch.nn.Parameter(torch.ones(2 * LAYERS + 1, WIDTH))
        self.qkv = torch.nn.Parameter(torch.randn(LAYERS * 3, WIDTH, WIDTH) * scale)
        self.out = torch.nn.Parameter(torch.zeros(LAYERS, WIDTH, WIDTH))
        self.gate_up = torch.nn.Parameter(torch.randn(LAYERS * 2, MLP, WIDTH) * scale)
        self.down = torch.nn.Parameter(torch.zeros(LAYERS, WIDTH, MLP))
        frequencies = THETA ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angles = torch.outer(torch.arange(MAX_LENGTH), frequencies)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, seen: torch.Tensor | None, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Logits [wanted, vocab] of the entries `wanted` of ids [rows, length], counted row by row.

        `places` [rows, length] are positions, `seen` [rows, 1, length, length] is added to the scores of attention.
        """
        rows, length = ids.shape
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        for i in range(LAYERS):
            h = F.rms_norm(x, (WIDTH,), self.norms[2 * i], EPS)
            q, k, v = F.linear(h, self.qkv[3 * i : 3 * i + 3].flatten(0, 1)).view(rows, length, 3, HEADS, -1).unbind(2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            q, k = turned(q, cos, sin).type_as(v), turned(k, cos, sin).type_as(v)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.out[i])
            h = F.rms_norm(x, (WIDTH,), self.norms[2 * i + 1], EPS)
            gate, up = F.linear(h, self.gate_up[2 * i : 2 * i + 2].flatten(0, 1)).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self.down[i])
        return F.linear(F.rms_norm(x.flatten(0, 1)[wanted], (WIDTH,), self.norms[-1], EPS), self.head)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def seen_by_level(levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Who sees whom of two streams, [rows, 1, length, length], as what is added to the scores of attention.

    Clear tokens see the clear ones of their chunk and before; masks see each other within their chunk, and the clear
    ones before it.
    """
    ours, theirs = levels[:, :, None], levels[:, None, :]
    of_masks = (theirs == ours) | ((theirs >= 0) & (theirs < -ours))
    seen = torch.where(ours < 0, of_masks, (theirs >= 0) & (theirs <= ours))
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def stacked(model: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, stacked as `Net` has them."""
    tensors = load_file(locate(model) / "model.safetensors")

    def each(*names: str) -> torch.Tensor:
        found = [tensors[f"{ROOT}blocks.{i}.{name}.weight"] for i in range(LAYERS) for name in names]
        return torch.stack(found).float()

    norms = torch.cat([each("attn_norm", "ff_norm"), tensors[ROOT + "ln_f.weight"].float()[None]])
    return {
        "embedding": tensors[ROOT + "wte.weight"].float(),
        "head": tensors[ROOT + "ff_out.weight"].float(),
        "norms": norms,
        "qkv": each("q_proj", "k_proj", "v_proj"),
        "out": each("attn_out"),
        "gate_up": each("ff_proj", "up_proj"),
        "down": each("ff_out"),
    }


def published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked weights under LLaDA's names."""
    tensors = {"wte": weights["embedding"], "ff_out": weights["head"], "ln_f": weights["norms"][-1]}
    for i in range(LAYERS):
        names = ("q_proj", "k_proj", "v_proj")
        block = {name: weights["qkv"][3 * i + j] for j, name in enumerate(names)}
        block |= {"attn_out": weights["out"][i], "ff_out": weights["down"][i]}
        block |= {"ff_proj": weights["gate_up"][2 * i], "up_proj": weights["gate_up"][2 * i + 1]}
        block |= {"attn_norm": weights["norms"][2 * i], "ff_norm": weights["norms"][2 * i + 1]}
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return {f"{ROOT}{name}.weight": tensor for name, tensor in tensors.items()}


def export(weights: dict[str, torch.Tensor], out: Path) -> None:
    """Write the checkpoint, in bfloat16, with its tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to(torch.bfloat16).cpu().contiguous() for name, tensor in published(weights).items()}
    temporary = out / "model.safetensors.new"
    save_file({name: tensor.clone() for name, tensor in plain.items()}, temporary, metadata={"format": "pt"})
    temporary.rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config(MASK, EOS), indent=1) + "\n")
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
