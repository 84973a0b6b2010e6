"""The parts that families are built from: packed spans, attention over them, rotary positions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dilaserve.models.kvcache import KVPool


class PackedSpan(NamedTuple):
    """Queries `[offset, offset + length)` of the packed tokens see the pool's tokens `[kv_start, kv_start + keys)`."""

    offset: int
    length: int
    kv_start: int
    keys: int


class Packed(NamedTuple):
    """The tokens of one step, without padding.

    `kept` are the packed tokens whose hidden states are wanted after the last layer, span by span, as `kept_spans` says
    in packed coordinates of their own; None keeps all.
    """

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], pool token of each
    spans: list[PackedSpan]
    kept: torch.Tensor | None  # [kept]
    kept_spans: list[PackedSpan]


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """cos + i sin of every position and frequency, complex64 [length, head_dim / 2] (RoFormer, section 3.4)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), theta**-exponents)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate x [tokens, …, head_dim], whose pairs lie side by side, by turns [tokens, head_dim / 2]; in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turns = turns.view(turns.shape[0], *(1,) * (x.dim() - 2), turns.shape[1])
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a q or k projection reordered from NeoX halves to neighbouring pairs, which `rotate` wants.

    Attention scores do not change: q and k are reordered alike.
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def attend(q: torch.Tensor, pool: KVPool, layer: int, spans: list[PackedSpan]) -> torch.Tensor:
    """Unmasked attention of each span's queries over its row's keys; q and the result are [tokens, heads, head_dim].

    Neighbouring spans of one shape share a call.
    """
    keys, values = pool.keys[layer], pool.values[layer]
    grouped = q.shape[1] != keys.shape[1]
    parts = []
    for group in alike(spans):
        first = group[0]
        rows = q[first.offset : first.offset + first.length * len(group)]
        rows = rows.view(len(group), first.length, *q.shape[1:]).transpose(1, 2)
        k = stacked([keys[span.kv_start : span.kv_start + span.keys] for span in group])
        v = stacked([values[span.kv_start : span.kv_start + span.keys] for span in group])
        out = F.scaled_dot_product_attention(rows, k, v, enable_gqa=grouped)
        parts.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows [keys, heads, head_dim] as one [rows, heads, keys, head_dim]; a single row is not copied."""
    return (rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)).transpose(1, 2)


def alike(spans: list[PackedSpan]) -> list[list[PackedSpan]]:
    groups: list[list[PackedSpan]] = []
    for span in spans:
        if groups and (groups[-1][0].length, groups[-1][0].keys) == (span.length, span.keys):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
