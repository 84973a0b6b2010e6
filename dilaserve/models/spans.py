"""The spans of a step on a device, and what computes them: values and signatures."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class PackedSpan(NamedTuple):
    """Queries `[offset, offset + length)` of the packed tokens see the pool's tokens `[kv_start, kv_start + keys)`.

    With a `grain` a query before the origin sees no further than the end of its own run of so many tokens; the first
    query lies `past` tokens behind the origin, before it if that is negative (see `types.Span`).

    With a `window` a query before the origin sees only so many keys, itself the last; all others see those that are
    less than `window` tokens before the origin, and what follows.
    """

    offset: int
    length: int
    kv_start: int
    keys: int
    grain: int = 0
    past: int = 0
    window: int = 0


class SpanGroup(NamedTuple):
    """Neighbouring spans of one query length that share a call; their keys are padded to the longest.

    `slots` are the pool tokens of the padded keys, [rows · keys], and `hidden` is -inf where a key is padding, else 0,
    [rows, 1, 1, keys]. A lone span needs no slots, as its keys are a slice of the pool, and `hidden` only where its
    queries see different keys, [1, 1, length, keys].
    """

    first: PackedSpan
    rows: int
    slots: torch.Tensor | None
    hidden: torch.Tensor | None


class Runs(NamedTuple):
    """The spans of a step on the device, for one call that takes them all. A row's K/V is one run of the pool.

    `most_queries` and `most_keys` bound the lengths; they may be more than any span has. `even`: all spans have
    `most_queries` queries. `causal`: a span's last query sees all its keys, each before it a key less than the next.
    """

    offsets: torch.Tensor  # int32 [spans + 1], the first query of each, and their number
    starts: torch.Tensor  # int32 [spans + 1], the pool token of each one's first key; the last says nothing
    keys: torch.Tensor  # int32 [spans]
    most_queries: int
    most_keys: int
    even: bool = False
    causal: bool = False


class SplitRuns(NamedTuple):
    """Runs of which some are causal, for a call of each kind, and the packed tokens of either."""

    open_tokens: torch.Tensor  # int64 [tokens of open runs]
    open: Runs
    causal_tokens: torch.Tensor  # int64 [tokens of causal runs]
    causal: Runs


class NoisyTokens(NamedTuple):
    """The tokens of blocks that began as noise: their places among the packed ones, and their embedding as the last
    step expected it, zeros in a block's first step.
    """

    places: torch.Tensor  # [noisy]
    expected: torch.Tensor  # [noisy, hidden]


class Packed(NamedTuple):
    """The tokens of one step, without padding.

    `kept` are the packed tokens whose hidden states are wanted after the last layer, span by span, as `kept_groups`
    says in packed coordinates of their own; None keeps all. `windows` are the groups of layers with a sliding window.
    """

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], pool token of each
    groups: list[SpanGroup] | Runs | SplitRuns
    kept: torch.Tensor | None  # [kept]
    kept_groups: list[SpanGroup] | Runs
    windows: list[SpanGroup] | None = None
    noisy: NoisyTokens | None = None


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Runs], torch.Tensor]


class Kernels(NamedTuple):
    """What lies between the matrix products of a layer; the functions of these names say what each does.

    `attend_even` is `each_run` for runs that are `even`; None leaves them to what takes all.
    """

    add_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    place: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    gated: Callable[[torch.Tensor], torch.Tensor]
    attend_even: Attention | None
