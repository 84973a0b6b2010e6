"""How many tokens each step of a block unmasks under the rules that count, by the schedule of the model's family."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dilaserve.types import Decoding, Schedule


class BlockMasks(NamedTuple):
    """A block of so many positions, and the masks in each of its parts; `first`: the first of them is one token that
    has a step of its own.
    """

    length: int
    masks: list[int]
    first: bool = False


def quotas(decoding: Decoding, blocks: Sequence[BlockMasks]) -> list[list[int]]:
    """Tokens by part and step, for the parts of all blocks."""
    shares, steps = [], steps_of_blocks(decoding, len(blocks))
    for (length, masks, first), count in zip(blocks, steps, strict=True):
        whole = block_shares(decoding.traits.schedule, sum(masks), length, count, first)
        shares += divided(whole, masks)
    return shares


def steps_of_blocks(decoding: Decoding, blocks: int) -> list[int]:
    steps = decoding.num_denoising_steps
    if decoding.traits.steps_per_block:
        return [steps] * blocks
    if decoding.traits.schedule in ("mdlm", "dream"):
        return [-(-steps // blocks)] * blocks
    return steps_per_block(steps, blocks)


def block_shares(schedule: Schedule, masks: int, length: int, steps: int, first: bool) -> list[int]:
    """Tokens by step of a block with so many masks. `block`: as if all of its `length` were masked (SDAR)."""
    if first:
        return [1, *block_shares(schedule, masks - 1, length, max(1, steps - (schedule == "dream")), False)]
    if schedule == "mdlm":
        return mdlm(masks, steps)
    if schedule == "dream":
        return list(dream_shares(masks, steps))
    return [share for share in even(length if schedule == "block" else masks, steps) if share]


def divided(shares: list[int], masks: list[int]) -> list[list[int]]:
    """The shares of a block's steps by part; a step that reaches past a part's end goes on in the next."""
    found = []
    for count in masks:
        mine: list[int] = []
        while count > 0:
            share = shares[0] if shares else 1
            mine.append(min(share, count))
            count -= mine[-1]
            shares = [share - mine[-1], *shares[1:]] if share > mine[-1] else shares[1:]
        found.append(mine)
    return found


@functools.lru_cache(maxsize=256)
def mdlm_shares(masks: int, steps: int) -> tuple[int, ...]:
    left, shares = masks, []
    one = np.float32(1)
    for step in range(steps):
        now, then = np.float32((steps - step) / steps), np.float32((steps - step - 1) / steps)
        ratio = float((one - (one - then)) / (one - (one - now)))
        share = min(left, round(left * (1.0 - ratio)))  # half to even
        left -= share
        shares.append(share)
    return tuple(share for share in shares if share)


def mdlm(masks: int, steps: int) -> list[int]:
    """The linear schedule of dllm's MDLM sampler (after Sahoo et al., arXiv 2406.07524); empty steps are left out.

    Half-way cases depend on its float32.
    """
    return list(mdlm_shares(masks, steps))


@functools.lru_cache(maxsize=256)
def dream_shares(masks: int, steps: int) -> tuple[int, ...]:
    """Dream's schedule from t = 1 to .001 (diffusion_generate): shares are cut to whole tokens, the last takes all.

    Empty steps are left out. Half-way cases depend on its float32.
    """
    left, shares = masks, []
    times = falling_times(steps)
    kept = times[1:] / times[:-1]
    for step in range(steps):
        share = left if step == steps - 1 else int(np.float32(left) * (np.float32(1) - kept[step]))
        left -= share
        shares.append(share)
    return tuple(share for share in shares if share)


def falling_times(steps: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """torch.linspace(1, .001, steps + 1): from both ends to the middle, with one rounding a value."""
    ends, place = np.array([1.0, 0.001], dtype=np.float32), np.arange(steps + 1)
    width = np.float64((ends[1] - ends[0]) / np.float32(steps))
    rising, falling = ends[0] + width * place, ends[1] - width * (steps - place)
    times: np.ndarray[Any, np.dtype[np.float32]] = np.where(place < (steps + 1) // 2, rising, falling).astype(
        np.float32
    )
    return times


def steps_per_block(steps: int, blocks: int) -> list[int]:
    """`steps` over `blocks`, as even as can be, the earlier ones taking the rest; each gets at least one."""
    return [max(1, share) for share in even(steps, blocks)]


def even(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole shares that differ by one at most, the larger first (LLaDA, get_num_transfer_tokens)."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]
