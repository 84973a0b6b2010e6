"""The parts that families are built from: packed spans, attention over them, rotary positions."""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dilaserve.models.kvcache import KVPool

log = logging.getLogger(__name__)
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


class Runs(NamedTuple):
    """The spans of a step on the device, for one call that takes them all. A row's K/V is one run of the pool.

    `most_queries` and `most_keys` bound the lengths; they may be more than any span has. `even`: all spans have
    `most_queries` queries.
    """

    offsets: torch.Tensor  # int32 [spans + 1], the first query of each, and their number
    starts: torch.Tensor  # int32 [spans + 1], the pool token of each one's first key; the last says nothing
    keys: torch.Tensor  # int32 [spans]
    most_queries: int
    most_keys: int
    even: bool = False


class Packed(NamedTuple):
    """The tokens of one step, without padding.

    `kept` are the packed tokens whose hidden states are wanted after the last layer, span by span, as `kept_groups`
    says in packed coordinates of their own; None keeps all.
    """

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], pool token of each
    groups: list[Group] | Runs
    kept: torch.Tensor | None  # [kept]
    kept_groups: list[Group] | Runs


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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm, cast to the model's type before the weight is applied, as LLaDA does."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    length: torch.Tensor = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True
    )  # one pass over x where the library makes three
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)


def add_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and its RMS norm; all [tokens, hidden]."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def place(
    fused: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q: int,
    kv: int,
) -> torch.Tensor:
    """Rotated queries [tokens, groups · q, head_dim]; rotated keys, and values, go to the pool tokens `slots`.

    `fused` is [tokens, groups, q + 2 kv, head_dim].
    """
    tokens, _, _, head_dim = fused.shape
    turned = rotate(fused[:, :, : q + kv], turns)
    keys.index_copy_(0, slots, turned[:, :, q:].reshape(tokens, -1, head_dim))
    values.index_copy_(0, slots, fused[:, :, q + kv :].reshape(tokens, -1, head_dim))
    return turned[:, :, :q].reshape(tokens, -1, head_dim)


def gated(fused: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [tokens, groups · width], of [tokens, groups, 2, width]."""
    gate, up = fused.unbind(2)
    return F.silu(gate).mul_(up).flatten(1)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Runs], torch.Tensor]


class Kit(NamedTuple):
    """What lies between the matrix products of a layer; the functions of these names say what each does.

    `attend_even` is `each_run` for runs that are `even`; None leaves them to what takes all.
    """

    add_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    place: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    gated: Callable[[torch.Tensor], torch.Tensor]
    attend_even: Attention | None


PLAIN = Kit(add_norm, place, gated, None)


def kit_for(device: torch.device) -> Kit:
    """The kernels where they can run, else plain torch."""
    if not has_kernels(device):
        return PLAIN
    from dilaserve.models import kernels

    return kernels.KIT


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there, which takes a GPU, Triton, and a C compiler for its launchers; tries one."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from dilaserve.models import kernels

    try:
        kernels.gated(torch.ones(1, 1, 2, 16, dtype=torch.bfloat16, device=device))
    except Exception as error:  # whatever is missing, steps go on without
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.warning("Triton's kernels do not run on %s (%s); steps will be slower", device, reason)
        return False
    return True


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a q or k projection reordered from NeoX halves to neighbouring pairs, which `rotate` wants.

    Attention scores do not change: q and k are reordered alike.
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def attend(q: torch.Tensor, pool: KVPool, layer: int, groups: list[Group] | Runs, kit: Kit = PLAIN) -> torch.Tensor:
    """Unmasked attention of each span's queries over its row's keys; q and the result are [tokens, heads, head_dim]."""
    keys, values = pool.keys[layer], pool.values[layer]
    if isinstance(groups, Runs):
        even = kit.attend_even if groups.even else None
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
    if {"seqused_k", "enable_gqa"} <= named:
        return public_varlen(varlen_attn)
    return raw_varlen() if "seqused_k" in schema() else None


def schema() -> str:
    return str(getattr(torch.ops.aten._flash_attention_forward, "default", None) and flash()._schema)


def flash() -> Any:
    return torch.ops.aten._flash_attention_forward.default


def public_varlen(call: Any) -> Attention:
    def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs) -> torch.Tensor:
        offsets, starts, used, most_queries, most_keys, _ = runs
        gqa = q.shape[1] != keys.shape[1]
        out: torch.Tensor = call(
            q, keys, values, offsets, starts, most_queries, most_keys, seqused_k=used, enable_gqa=gqa
        )
        return out

    return attention


def raw_varlen() -> Attention:
    """What varlen_attn calls, for versions of torch whose varlen_attn does not hand on `seqused_k`."""

    def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs) -> torch.Tensor:
        offsets, starts, used, most_queries, most_keys, _ = runs
        arguments = (q, keys, values, offsets, starts, most_queries, most_keys, 0.0, False, False)
        out: torch.Tensor = flash()(*arguments, seqused_k=used)[0]
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
        out[first:end] = F.scaled_dot_product_attention(query, key, value, enable_gqa=gqa)[0].transpose(0, 1)
    return out


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
