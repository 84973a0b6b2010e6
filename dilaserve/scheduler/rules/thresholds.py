"""The confidence threshold of each row, by its own slack, above a floor that the load moves."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from dilaserve.types import Load

INFLATED = 2.0  # factor on the time needed before a level counts as enough: thresholds fall early and by little
NEEDED = 1.1  # the same for levels that the budget cannot afford for all requests: only rows in need get these
FUTILE = 1.5  # factor on the time left beyond which even the deepest level is too slow: no points are spent on the row
SPARED = 1.75  # factor on the time needed that a row keeps before others may share its step; renewed each step
TOO_MANY, FEW = 0.2, 0.05  # shares of rows expected to miss above which the floor falls, below which it rises
CROWDED, ROOMY = 1.5, 0.8  # crowding that does the same, as rows with long deadlines are seen to miss only too late


class ByLevel(Protocol):
    """What a row still needs, by level from the reference down."""

    def __getitem__(self, level: int, /) -> Load: ...


class ThresholdQuery(msgspec.Struct, frozen=True, gc=False):
    """A row with a deadline: seconds left, its load by level, and the deepest level that it may use.

    `affordable_level` is the deepest at which all requests could run within the accuracy budget.
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

    `queries` are in the order of service; levels count from 0, the reference. While `floor` is above 0, rows crowd, and
    any row may spend points early: that frees time for all. Otherwise levels that the budget cannot afford for all
    requests are for rows in need only. A row that no level would save stays at the floor.
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
    """All rows at the reference threshold."""
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
