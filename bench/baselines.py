"""What a user would run without a server: the published loops, with a plain batched forward pass.

Written the way their authors publish them: logits of the whole input, float64 softmax, concatenated caches, no stop at
the end of the answer.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Plain:
    """LLaDA with a batch dimension: ids [rows, tokens]; `hidden` [rows] counts the padding at the left of each row."""

    def __init__(self, directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        root = "model.transformer."
        self.device, self.w = torch.device(device), {}
        for file in sorted(directory.glob("*.safetensors")):
            for name, tensor in load_file(file, device=device).items():
                self.w[name.removeprefix(root).removesuffix(".weight")] = tensor.to(dtype)
        self.heads, self.mask_id = self.config["n_heads"], self.config["mask_token_id"]
        self.head_dim = self.config["d_model"] // self.heads
        self.eps = self.config["rms_norm_eps"]
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(self.config["max_sequence_length"] + 512), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x * self.cos[positions].unsqueeze(-3) + rotated * self.sin[positions].unsqueeze(-3)).to(x.dtype)

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, start: int = 0, cache: Cache | None = None, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Logits [rows, tokens, vocab] and the K/V of the whole canvas; with a cache, K/V of ids replace their part."""
        rows, tokens = ids.shape
        x, kept = F.embedding(ids, self.w["wte"]), []
        mine = torch.arange(start, start + tokens, device=self.device)
        for i in range(self.config["n_layers"]):
            name = f"blocks.{i}."
            h = F.rms_norm(x, x.shape[-1:], self.w[name + "attn_norm"], self.eps)
            q, k, v = (
                F.linear(h, self.w[name + part]).view(rows, tokens, self.heads, -1).transpose(1, 2)
                for part in ("q_proj", "k_proj", "v_proj")
            )
            if cache is not None:
                k = torch.cat((cache[i][0][:, :, :start], k, cache[i][0][:, :, start + tokens :]), 2)
                v = torch.cat((cache[i][1][:, :, :start], v, cache[i][1][:, :, start + tokens :]), 2)
            kept.append((k, v))
            every = torch.arange(k.shape[2], device=self.device)
            mixed = F.scaled_dot_product_attention(self.turned(q, mine), self.turned(k, every), v, attn_mask=visible)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.w[name + "attn_out"])
            h = F.rms_norm(x, x.shape[-1:], self.w[name + "ff_norm"], self.eps)
            gate = F.silu(F.linear(h, self.w[name + "ff_proj"]))
            x = x + F.linear(gate * F.linear(h, self.w[name + "up_proj"]), self.w[name + "ff_out"])
        return F.linear(F.rms_norm(x, x.shape[-1:], self.w["ln_f"], self.eps), self.w["ff_out"]), kept


def unmask(
    x: torch.Tensor, logits: torch.Tensor, start: int, end: int, mask_id: int, threshold: float, quota: int = 1
) -> None:
    """Threshold transfer in [start, end) of every row of x, in place; `logits` begin at `start`.

    At least `quota` go: weights that were never trained reach no threshold, and their steps would not be real.
    """
    block = x[:, start:end]
    masked = block == mask_id
    choices = logits[:, : end - start].clone()
    choices[..., mask_id] = -torch.inf  # a mask as its own prediction would never end
    token = choices.argmax(-1)
    probability = F.softmax(logits.to(torch.float64), -1)[:, : end - start]
    confidence = probability.gather(-1, token.unsqueeze(-1)).squeeze(-1).masked_fill(~masked, -torch.inf)
    first = confidence.topk(min(quota, end - start), dim=-1).indices
    best = F.one_hot(first, end - start).bool().any(-2)
    x[:, start:end] = torch.where(masked & (best | (confidence >= threshold)), token, block)


def loop(
    model: Plain,
    prompts: list[list[int]],
    answer: int,
    block: int,
    threshold: float,
    dual: bool,
    quotas: Sequence[int] = (1,),
) -> tuple[list[list[int]], int]:
    """Decode the prompts in lockstep (one, or a left-padded batch); returns the answers and the forward passes.

    `quotas` are the least tokens of each step of a block, the last of all that follow.
    """
    width = max(map(len, prompts))
    hidden = torch.tensor([width - len(prompt) for prompt in prompts])
    x = torch.full((len(prompts), width + answer), model.mask_id)
    for row, prompt in enumerate(prompts):
        x[row, :width] = torch.tensor([0] * int(hidden[row]) + prompt)
    visible = None
    if len(prompts) > 1:
        visible = (torch.arange(x.shape[1]) >= hidden[:, None])[:, None, None, :].to(model.device)
    x = x.to(model.device)
    passes = 0
    for start in range(width, width + answer, block):
        end, cache, steps = start + block, None, 0
        while bool((x[:, start:end] == model.mask_id).any()):
            if dual and cache is not None:
                logits, cache = model.forward(x[:, start:end], start, cache, visible)
            else:
                logits, cache = model.forward(x, 0, None, visible)
                logits = logits[:, start:]
            unmask(x, logits, start, end, model.mask_id, threshold, quotas[min(steps, len(quotas) - 1)])
            steps, passes = steps + 1, passes + 1
    return [x[row, width:].tolist() for row in range(len(prompts))], passes
