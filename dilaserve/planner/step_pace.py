"""Seconds of a request's life on an instance that it shares, by the mean-field law of its steps.

It knows the steps of full-attention and of exact families; it knows no plan, no traffic and no waiting.
"""

import math
from typing import NamedTuple

import numpy as np

from dilaserve.profile.block_chain import Outlook
from dilaserve.profile.step_cost import StepCost
from dilaserve.types import FamilyTraits

NEVER = float("inf")


class Kind(NamedTuple):
    """A class of requests as planning sees it: tokens of the canvas and of the answer, seconds until the deadline.

    `weight` is what one of them is worth against others, `task` names the quality profile.
    """

    canvas: int
    answer: int
    deadline: float = NEVER
    weight: float = 1.0
    task: str | None = None


class Stepping(NamedTuple):
    """What the steps of a family are: how it attends, and queries of a step, where a prompt may take several."""

    traits: FamilyTraits = FamilyTraits()
    max_tokens: int = 2**31

    @property
    def exact(self) -> bool:
        return self.traits.exact


FULL = Stepping()


class Blocks(NamedTuple):
    """The blocks of an answer: their number, their tokens, and those of them that the decode-speed law is asked for."""

    number: int
    length: int
    masks: int

    @property
    def masked(self) -> tuple[int, int]:
        return self.number, self.masks


class Pace(NamedTuple):
    """A request on an instance that it shares, by rows on the instance: seconds of its life, seconds of one step."""

    life: np.ndarray  # [rows]
    step: np.ndarray  # [rows]


def blocks(kind: Kind, length: int, stepping: Stepping = FULL) -> Blocks:
    """The blocks of the answer, of `length` tokens each unless the family was trained with another.

    The first token of a block may have a step of its own, which the law does not count.
    """
    if stepping.exact:
        length = stepping.traits.block_length or length
    masks = max(1, length - 1) if stepping.traits.first_token else length
    return Blocks(max(1, -(-kind.answer // length)), length, masks)


def paced(
    law: StepCost, kind: Kind, ahead: Outlook, rows: int, block: int, overhead: float, stepping: Stepping = FULL
) -> Pace:
    """The mean-field step law: the refreshes of all rows fall on different steps while there are enough of them."""
    if stepping.exact:
        return exact(law, kind, ahead, rows, block, overhead, stepping)
    lives, paces = [], []
    refreshes = ahead.refreshes
    steps = ahead.steps + (refreshes if stepping.traits.first_token else 0.0)  # a block's first token alone
    for company in range(1, rows + 1):
        due = min(refreshes * company, steps)  # steps with a refresh during one life
        each = refreshes * company / due if due else 0.0
        busy = seconds(law, kind, each, company - each, block) + overhead
        calm = seconds(law, kind, 0.0, company, block) + overhead
        life = due * busy + (steps - due) * calm
        lives.append(life)
        paces.append(life / steps)
    return Pace(np.array(lives), np.array(paces))


def seconds(law: StepCost, kind: Kind, refreshing: float, reusing: float, block: int) -> float:
    tokens = refreshing * kind.canvas + reusing * block
    attention = refreshing * kind.canvas**2 + reusing * block * kind.canvas
    rows = refreshing + reusing
    every = law.fixed + law.expert_seconds(tokens)
    return every + law.marginal(tokens, attention, rows * kind.canvas, rows * (block + 1) / 2, rows)  # type: ignore[arg-type]


class Part(NamedTuple):
    """What one row computes in a step of one kind."""

    tokens: float
    keys: float


def exact(
    law: StepCost, kind: Kind, ahead: Outlook, rows: int, block: int, overhead: float, stepping: Stepping
) -> Pace:
    """The same where K/V of finished blocks are exact: nothing is computed twice.

    A life is the prompt, in chunks of at most `max_tokens`, the last one with the first block; then for each later
    block a step that takes in the finished one and begins the next; all others compute the open block. Where a block's
    first token comes from the position before it, taking in the finished block is a step for itself.
    """
    alone = stepping.traits.first_token
    prompt, block_keys = max(0, kind.canvas - kind.answer), kind.canvas - kind.answer / 2
    first = max(1, prompt + (0 if alone else block))
    fills = max(1, math.ceil(first / stepping.max_tokens))
    begins = max(0.0, ahead.refreshes - 1.0)
    steps = max(fills + begins, ahead.steps + fills - 1 + (ahead.refreshes if alone else 0.0))
    fill = Part(first / fills, first * (fills + 1) / (2 * fills))
    begin, stay = Part(block if alone else 2 * block, block_keys), Part(block, block_keys)
    begun = begins / max(1e-9, steps - fills)  # share of the steps without a chunk of the prompt
    lives = []
    for company in range(1, rows + 1):
        due = min(fills * company, steps)  # steps with a chunk of some row's prompt during one life
        each = fills * company / due
        mixes = [
            ((fill, filling), (begin, begun * (company - filling)), (stay, (1 - begun) * (company - filling)))
            for filling in (each, 0.0)
        ]
        busy, calm = (mixed(law, mix, block) + overhead for mix in mixes)
        lives.append(due * busy + (steps - due) * calm)
    return Pace(np.array(lives), np.array(lives) / steps)


def mixed(law: StepCost, mix: tuple[tuple[Part, float], ...], block: int) -> float:
    """Seconds of a step of so many rows of each kind, on average."""
    tokens = sum(part.tokens * rows for part, rows in mix)
    attention = sum(part.tokens * part.keys * rows for part, rows in mix)
    keys = sum(part.keys * rows for part, rows in mix)
    company = sum(rows for _, rows in mix)
    every = law.fixed + law.expert_seconds(tokens)
    return every + law.marginal(tokens, attention, keys, company * (block + 1) / 2, company)  # type: ignore[arg-type]
