"""How many tokens each step of a block unmasks under the steps rule."""


def steps_per_block(steps: int, blocks: int) -> list[int]:
    """`steps` over `blocks`, as even as can be, the earlier ones taking the rest; each gets at least one."""
    return [max(1, share) for share in even(steps, blocks)]


def even(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole shares that differ by one at most, the larger first (LLaDA, get_num_transfer_tokens)."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]
