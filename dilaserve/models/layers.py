"""The parts that families are built from: packed spans, attention over them, rotary positions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dilaserve.models.kvcache import KVPool

MAX_PADDING = 1.25  # keys of a group's longest row over those of its shortest
MAX_KEYS = 640  # of one group, so that its K and V stay in a core's cache


class PackedSpan(NamedTuple):
    """Queries `[offset, offset + length)` of the packed tokens see the pool's tokens `[kv_start, kv_start + keys)`."""

    offset: int
    length: int
    kv_start: int
    keys: int


class Group(NamedTuple):
    """Neighbouring spans of one query length that share a call; their keys are padded to the longest.

    `slots` are the pool tokens of the padded keys, [rows · keys], and `hidden` is -inf where a key is padding, else 0,
    [rows, 1, 1, keys]. A lone span needs neither: its keys are a slice of the pool.
    """

    first: PackedSpan
    rows: int
    slots: torch.Tensor | None
    hidden: torch.Tensor | None


class Packed(NamedTuple):
    """The tokens of one step, without padding.

    `kept` are the packed tokens whose hidden states are wanted after the last layer, span by span, as `kept_groups`
    says in packed coordinates of their own; None keeps all.
    """

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], pool token of each
    groups: list[Group]
    kept: torch.Tensor | None  # [kept]
    kept_groups: list[Group]


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


def attend(q: torch.Tensor, pool: KVPool, layer: int, groups: list[Group]) -> torch.Tensor:
    """Unmasked attention of each span's queries over its row's keys; q and the result are [tokens, heads, head_dim]."""
    keys, values = pool.keys[layer], pool.values[layer]
    gqa = q.shape[1] != keys.shape[1]
    parts = []
    for first, rows, slots, hidden in groups:
        queries = q[first.offset : first.offset + first.length * rows]
        if slots is None:
            mine = slice(first.kv_start, first.kv_start + first.keys)
            k, v = keys[mine], values[mine]
        else:
            k, v = keys.index_select(0, slots), values.index_select(0, slots)
        query, key, value = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (queries, k, v))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=hidden, enable_gqa=gqa)
        parts.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def grouped(spans: list[PackedSpan], device: torch.device) -> list[Group]:
    """Put neighbours of one query length together while padding wastes little and a core's cache holds their keys."""
    runs: list[list[PackedSpan]] = []
    for span in spans:
        first = runs[-1][0] if runs else span
        fits = span.keys <= MAX_PADDING * first.keys and span.keys * (len(runs[-1]) + 1 if runs else 1) <= MAX_KEYS
        if runs and span.length == first.length and fits:
            runs[-1].append(span)
        else:
            runs.append([span])
    return [group(run, device) for run in runs]


def group(run: list[PackedSpan], device: torch.device) -> Group:
    if len(run) == 1:
        return Group(run[0], 1, None, None)
    starts, keys = torch.tensor([(span.kv_start, span.keys) for span in run], device=device).T
    column = torch.arange(int(keys.max()), device=device)
    padding = column >= keys[:, None]
    slots = (starts[:, None] + column).masked_fill(padding, run[0].kv_start).flatten()
    hidden = torch.zeros(padding.shape, device=device).masked_fill(padding, -torch.inf)[:, None, None]
    return Group(run[0], len(run), slots, hidden if bool(padding.any()) else None)
