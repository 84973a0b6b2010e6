"""How many tokens each step of a block unmasks under the steps rule, by the schedule of the model's family."""

import functools

import numpy as np

from dilaserve.types import Schedule


def quotas(schedule: Schedule, steps: int, lengths: list[int]) -> list[list[int]]:
    """Tokens by block and step, for `steps` over blocks of these lengths."""
    if schedule == "mdlm":
        share = -(-steps // len(lengths))
        return [mdlm(length, share) for length in lengths]
    return [even(length, share) for length, share in zip(lengths, steps_per_block(steps, len(lengths)), strict=True)]


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


def steps_per_block(steps: int, blocks: int) -> list[int]:
    """`steps` over `blocks`, as even as can be, the earlier ones taking the rest; each gets at least one."""
    return [max(1, share) for share in even(steps, blocks)]


def even(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole shares that differ by one at most, the larger first (LLaDA, get_num_transfer_tokens)."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]
