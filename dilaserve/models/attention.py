"""Attention over packed spans: the ways to compute it, and which one a device gets."""

import functools
import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dilaserve.models.blocks import PLAIN
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import Attention, Kernels, PackedSpan, Runs, SpanGroup, SplitRuns

MAX_PADDING = 1.25  # keys of a group's longest row over those of its shortest
MAX_KEYS = 640  # of one group, so that its K and V stay in a core's cache


def attend(
    q: torch.Tensor, pool: KVPool, layer: int, groups: list[SpanGroup] | Runs | SplitRuns, kernels: Kernels = PLAIN
) -> torch.Tensor:
    """Attention of each span's queries over the keys that they see; q and the result are [tokens, heads, head_dim]."""
    if isinstance(groups, SplitRuns):
        out = torch.empty_like(q)
        for tokens, runs in ((groups.open_tokens, groups.open), (groups.causal_tokens, groups.causal)):
            out[tokens] = attend(q[tokens], pool, layer, runs, kernels)
        return out
    keys, values = pool.keys[layer], pool.values[layer]
    if isinstance(groups, Runs):
        even = kernels.attend_even if groups.even else None
        return (even or varlen_for(q.device, q.dtype, q.shape[-1]) or each_run)(q, keys, values, groups)
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


@functools.cache
def varlen_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention | None:
    """Flash attention over runs of different lengths, or None where the device or the installed torch has none.

    Its `seqused_k` lets a run end anywhere, so a run's place is all that it needs to know: a table of pages would ask
    for pages of 256 tokens, and rows have one run each.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return raw_varlen() if "seqused_k" in schema() else None
    named = set(inspect.signature(varlen_attn).parameters)
    if {"seqused_k", "enable_gqa"} <= named and {"window_size", "is_causal"} & named:
        return public_varlen(varlen_attn, dict(window_size=(-1, 0)) if "window_size" in named else dict(is_causal=True))
    return raw_varlen() if "seqused_k" in schema() else None


def schema() -> str:
    return str(getattr(torch.ops.aten._flash_attention_forward, "default", None) and flash()._schema)


def flash() -> Any:
    return torch.ops.aten._flash_attention_forward.default


def public_varlen(call: Any, causal: dict[str, Any]) -> Attention:
    """`causal` are the arguments that make `call` causal, bottom-right aligned as `Runs` want it."""

    def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs) -> torch.Tensor:
        numbers = runs.offsets, runs.starts, runs.most_queries, runs.most_keys
        how = dict(seqused_k=runs.keys, enable_gqa=q.shape[1] != keys.shape[1], **(causal if runs.causal else {}))
        out: torch.Tensor = call(q, keys, values, *numbers, **how)
        return out

    return attention


def raw_varlen() -> Attention:
    """What varlen_attn calls, for versions of torch whose varlen_attn does not hand on `seqused_k`."""

    def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs) -> torch.Tensor:
        numbers = runs.offsets, runs.starts, runs.most_queries, runs.most_keys
        out: torch.Tensor = flash()(q, keys, values, *numbers, 0.0, runs.causal, False, seqused_k=runs.keys)[0]
        return out

    return attention


def each_run(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The same in plain torch, span by span; it defines the result, and is what a CPU checks."""
    out, gqa = torch.empty_like(q), q.shape[1] != keys.shape[1]
    offsets = runs.offsets.tolist()
    for first, end, start, used in zip(offsets, offsets[1:], runs.starts.tolist(), runs.keys.tolist(), strict=False):
        query, key, value = (
            x.transpose(0, 1)[None] for x in (q[first:end], keys[start : start + used], values[start : start + used])
        )
        seen = bottom_right(end - first, used, q.device) if runs.causal else None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=gqa)
        out[first:end] = mixed[0].transpose(0, 1)
    return out


def bottom_right(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which keys each query sees where the last sees all, bool [queries, keys]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def grouped(spans: list[PackedSpan], device: torch.device) -> list[SpanGroup]:
    """Put neighbours of one query length together while padding wastes little and a core's cache holds their keys."""
    runs: list[list[PackedSpan]] = []
    for span in spans:
        first = runs[-1][0] if runs else span
        fits = span.keys <= MAX_PADDING * first.keys and span.keys * (len(runs[-1]) + 1 if runs else 1) <= MAX_KEYS
        if runs and span.length == first.length and fits and not (span.grain or first.grain):
            runs[-1].append(span)
        else:
            runs.append([span])
    return [group(run, device) for run in runs]


def windowed(spans: list[PackedSpan], window: int) -> list[PackedSpan]:
    """The spans as a layer with a sliding window sees them, without the keys before every window."""
    found = []
    for span in spans:
        unseen = max(0, span.keys - span.length - (window - 1))
        found.append(span._replace(kv_start=span.kv_start + unseen, keys=span.keys - unseen, window=window))
    return found


def group(run: list[PackedSpan], device: torch.device) -> SpanGroup:
    if len(run) == 1:
        return SpanGroup(run[0], 1, None, by_grain(run[0], device) if run[0].grain else None)
    starts, keys = torch.tensor([(span.kv_start, span.keys) for span in run], device=device).T
    column = torch.arange(int(keys.max()), device=device)
    padding = column >= keys[:, None]
    slots = (starts[:, None] + column).masked_fill(padding, run[0].kv_start).flatten()
    hidden = torch.zeros(padding.shape, device=device).masked_fill(padding, -torch.inf)[:, None, None]
    return SpanGroup(run[0], len(run), slots, hidden if bool(padding.any()) else None)


def by_grain(span: PackedSpan, device: torch.device) -> torch.Tensor:
    """-inf where a query does not see a key, else 0, [1, 1, length, keys]; the last query is that of the last key.

    On the host, in numpy: for the few queries of most spans each of torch's calls would take longer than its work.
    """
    behind = np.arange(span.length) + span.past
    ends = np.where(behind < 0, (behind // span.grain + 1) * span.grain, span.length + span.past)  # from the origin
    key = np.arange(span.keys) - (span.keys - span.length - span.past)
    seen = key < ends[:, None]
    if span.window:
        seen &= key > np.minimum(behind, 0)[:, None] - span.window
    hidden = np.where(seen, np.float32(0.0), np.float32(-np.inf))
    return torch.from_numpy(hidden).to(device)[None, None]
