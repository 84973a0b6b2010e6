"""The authors' decoding loops, written as plainly as possible, and a forward pass to run them on.

Nothing here is shared with the engine: one prompt at a time, the whole canvas padded with nothing, softmax in float64.
Sources: LLaDA's generate.py (arXiv 2502.09992) and Fast-dLLM v1 (arXiv 2505.22618).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURE = Path(__file__).parent / "fixtures" / "llada"
CASES = json.loads((FIXTURE / "cases.json").read_text())
PUBLISHED_CACHES = {"generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}


class Llada:
    """LLaDA's forward pass by the published tensor names, with K/V kept before the rotation as Fast-dLLM does."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = {}
        for file in sorted(directory.glob("*.safetensors")):
            self.weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
        self.mask_id = self.config["mask_token_id"]
        self.heads = self.config["n_heads"]
        self.kv_heads = self.config.get("n_kv_heads") or self.heads
        self.head_dim = self.config["d_model"] // self.heads

    def w(self, name: str) -> torch.Tensor:
        return self.weights[f"model.transformer.{name}.weight"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.w(name)

    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """NeoX halves; x is [heads, tokens, head_dim] at positions start, start + 1, …"""
        half = self.head_dim // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half).float() * 2 / self.head_dim)
        angle = torch.outer(torch.arange(start, start + x.shape[1]).float(), frequency)
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    @torch.no_grad()
    def forward(self, ids, cache=None, start=0, mode="append"):
        """Logits of ids, and the K/V of every layer; `ids` begin at canvas position `start`.

        With a cache, `append` puts the new K/V behind it, `replace` puts it over the positions it belongs to.
        """
        x, kept = self.w("wte")[torch.tensor(ids)], []
        for i in range(self.config["n_layers"]):
            b = f"blocks.{i}."
            h = self.norm(x, b + "attn_norm")
            q = (h @ self.w(b + "q_proj").T).view(-1, self.heads, self.head_dim).transpose(0, 1)
            k = (h @ self.w(b + "k_proj").T).view(-1, self.kv_heads, self.head_dim).transpose(0, 1)
            v = (h @ self.w(b + "v_proj").T).view(-1, self.kv_heads, self.head_dim).transpose(0, 1)
            if cache is not None and mode == "append":
                k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
            elif cache is not None:
                old_k, old_v = cache[i][0].clone(), cache[i][1].clone()
                old_k[:, start : start + len(ids)], old_v[:, start : start + len(ids)] = k, v
                k, v = old_k, old_v
            kept.append((k, v))
            share = self.heads // self.kv_heads
            rk, rv = self.rotate(k, 0).repeat_interleave(share, 0), v.repeat_interleave(share, 0)
            scores = self.rotate(q, start) @ rk.transpose(1, 2) / self.head_dim**0.5
            x = x + (scores.softmax(-1) @ rv).transpose(0, 1).flatten(1) @ self.w(b + "attn_out").T
            h = self.norm(x, b + "ff_norm")
            gate = torch.nn.functional.silu(h @ self.w(b + "ff_proj").T)
            x = x + (gate * (h @ self.w(b + "up_proj").T)) @ self.w(b + "ff_out").T
        head = self.w("wte") if self.config["weight_tying"] else self.w("ff_out")
        return self.norm(x, "ln_f") @ head.T, kept


def quotas(masks: int, steps: int) -> list[int]:
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def transfer(logits, x, start, end, generated, mask_id, rule):
    """Unmask positions [start, end) of x in place; `logits` begin at `start`. `rule` is ("quota" | …, value).

    Only positions from `generated` on are ever masked: a mask token in the prompt is the user's own.
    """
    masked = [p for p in range(max(start, generated), end) if x[p] == mask_id]
    probability = logits.double().softmax(-1)
    guesses = []
    for p in masked:
        token = int(logits[p - start].argmax())
        guesses.append((float(probability[p - start, token]), p, token))
    guesses.sort(key=lambda guess: (-guess[0], guess[1]))
    kind, value = rule
    if kind == "quota":
        count = value
    elif kind == "threshold":
        count = max(1, sum(confidence >= value for confidence, _, _ in guesses))
    else:
        count = factor_count([confidence for confidence, _, _ in guesses], value)
    for _, p, token in guesses[:count]:
        x[p] = token


def factor_count(confidences: list[float], factor: float) -> int:
    thresholds = [1 - factor / (n + 1) for n in range(1, len(confidences) + 1)]
    thresholds[0] = -1
    for i in range(len(confidences)):
        if confidences[i] < thresholds[i]:
            break
    if i == 0 or i == len(confidences) - 1:
        i += 1
    return i


def decode(model, prompt, gen_length, block_length, cache="none", steps=None, threshold=None, factor=None):
    """One prompt by Fast-dLLM's loop for this cache kind; returns (tokens, forward passes).

    With cache "none" and `steps` it is LLaDA's own generate.py, which fills the same quotas.
    """
    p, total, mask = len(prompt), len(prompt) + gen_length, model.mask_id
    x = list(prompt) + [mask] * gen_length
    blocks, forwards = -(-gen_length // block_length), 0
    for b in range(blocks):
        start, end = p + b * block_length, min(p + (b + 1) * block_length, total)
        quota = quotas(end - start, steps // blocks) if steps else None
        kept, step = None, 0
        while mask in x[start:end]:
            rule = ("quota", quota[step]) if quota else ("factor", factor) if factor else ("threshold", threshold)
            if kept is None:
                logits, kept = model.forward(x)
                logits = logits[start:]
                if cache == "prefix":
                    kept = [(k[:, :start], v[:, :start]) for k, v in kept]
                elif cache == "none":
                    kept = None
            elif cache == "prefix":
                logits, _ = model.forward(x[start:], kept, start, "append")
            else:
                logits, kept = model.forward(x[start:end], kept, start, "replace")
            transfer(logits, x, start, end, p, mask, rule)
            forwards, step = forwards + 1, step + 1
    return x[p:], forwards


def cache_of(case):
    """The kind of cache that the decoder of a recorded case uses."""
    return PUBLISHED_CACHES.get(case["decoder"].split(".")[-1], "none")
