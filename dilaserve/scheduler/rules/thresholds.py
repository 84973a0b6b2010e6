"""The confidence threshold of each row, by its own slack, above a floor that the load moves."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from dilaserve.types import Load

INFLATED = 2.0  # times the demand: lower early and mildly, not late and harshly
NEEDED = 1.1  # times the demand, for levels that the budget cannot bear for everybody
FUTILE = 1.5  # times what is left that a row needs alone at its deepest level: points would be spent for nothing
SPARED = 1.75  # times the demand that is kept before a row lets others ride; looked at again after every step
TOO_MANY, FEW = 0.2, 0.05  # shares of rows expected to miss, that lower and raise the floor
CROWDED, ROOMY = 1.5, 0.8  # crowding that does the same: long deadlines are missed only when it is too late to hurry


class ByLevel(Protocol):
    """What a row still needs, by level from the reference down."""

    def __getitem__(self, level: int, /) -> Load: ...


class ThresholdQuery(msgspec.Struct, frozen=True, gc=False):
    """A row with a deadline: seconds left, its load by level, the deepest level allowed, and the deepest that the
    budget bears if everybody runs at it.
    """

    left: float
    loads: ByLevel
    deepest: int
    affordable_level: int


class ThresholdChoice(msgspec.Struct, frozen=True, gc=False):
    """The level to run at, what the row can spare there, and whether the deadline will probably be missed."""

    level: int
    slack: float
    late: bool


def by_slack(queries: Sequence[ThresholdQuery], floor: int, fixed: float) -> list[ThresholdChoice]:
    """The highest level at or below `floor` at which each row, with all rows before it, keeps its deadline.

    `queries` stand in the order of service; levels count from 0, the reference. Where rows crowd, points that are spent
    early buy room for all. Where they do not, what the budget does not bear for everybody is kept for rows in need. A
    row that no level would save stays at the floor.
    """
    steps = work = 0.0
    choices: list[ThresholdChoice] = []
    for query in queries:
        left, loads, deepest = query.left, query.loads, query.deepest
        early = deepest if floor else query.affordable_level
        level = start = floor if floor < deepest else deepest
        while True:
            load = loads[level]
            joint_steps = load.steps if load.steps > steps else steps
            joint_work = work + load.work
            seconds = joint_steps * fixed + joint_work
            if start < level == deepest and left * FUTILE < load.steps * fixed + load.work:
                level = deepest = start
            elif level >= deepest or left >= (INFLATED if level < early else NEEDED) * seconds:
                break
            else:
                level += 1
        steps, work = joint_steps, joint_work
        slack = left - SPARED * seconds
        choices.append(ThresholdChoice(level, slack if slack > 0.0 else 0.0, left < seconds))
    return choices


def fixed_levels(queries: Sequence[ThresholdQuery], floor: int, fixed: float) -> list[ThresholdChoice]:
    """Everybody at the reference."""
    return by_slack([ThresholdQuery(query.left, query.loads, 0, 0) for query in queries], 0, fixed)


def crowding(loads: Sequence[Load], fixed: float) -> float:
    """How many times as long the rows of an instance take together as one of them alone; 0 for a row that is alone."""
    if len(loads) < 2:
        return 0.0
    work = sum([load.work for load in loads])
    together = max([load.steps for load in loads]) * fixed + work
    return together * len(loads) / (sum([load.steps for load in loads]) * fixed + work)


def moved(floor: int, missing: float, crowd: float, deepest: int) -> int:
    """The floor after another look at the share of rows expected to miss, and at the mean crowding of instances."""
    if missing > TOO_MANY or crowd > CROWDED:
        return min(deepest, floor + 1)
    if missing < FEW and crowd < ROOMY:
        return max(0, floor - 1)
    return floor


CONTROLS = {"fixed": fixed_levels, "slack": by_slack, "slack+floor": by_slack}
