"""Admission: the test on arrival, which requests are hopeless, when a refused client should come back."""

from collections.abc import Sequence

import msgspec

COMPANY = 0.9  # factor on the joint time of rows in the test; a smaller value admits more
KEPT = 0.8  # share of its unloaded slack that a newcomer must keep; a larger value admits fewer
HELD = 1.2  # factor on the joint time: the margin of a resident row that newcomers ahead of it must not take
LONGEST_WAIT = 60.0  # seconds, the longest Retry-After; OpenAI's clients ignore longer ones
NOTHING_RUNS = 5.0  # seconds, the Retry-After while no row runs, as when workers start
HOPELESS = 1.05  # factor on the unloaded time above the time left at which a request is given up


class Room(msgspec.Struct, frozen=True, gc=False):
    """An instance as placement sees it: rows resident, rows allowed, seconds of the newcomer there if it were alone."""

    instance: int
    residents: int
    limit: int
    seconds: float = 1.0


class DeadlineRow(msgspec.Struct, frozen=True, gc=False):
    """A row with a deadline: seconds left until it, steps and work ahead, what it is worth."""

    left: float
    steps: float
    work: float
    weight: float


def least_loaded(rooms: Sequence[Room]) -> list[int]:
    """Instances with a free row, the emptiest first, as far as they are equally fast."""
    free = [room for room in rooms if room.residents < room.limit]
    ordered = sorted(free, key=lambda room: ((room.residents + 1) * room.seconds, room.instance))
    return [room.instance for room in ordered]


def fits(newcomer: DeadlineRow, residents: Sequence[DeadlineRow], fixed: float) -> float | None:
    """The least relative slack on the instance if the newcomer joins, or None when it must not.

    `residents` are in the order of their deadlines. The newcomer must keep most of the slack that it would have alone.
    A row behind it that meets its deadline with the margin `HELD` must keep that margin, unless it has a lower weight.
    A row that has no such margin does not keep newcomers out.
    """
    left = newcomer.left
    slack = left - newcomer.steps * fixed - newcomer.work
    if slack <= 0.0:
        return None
    steps = work = without_steps = without_work = 0.0
    least = 1.0
    here = False
    for row in residents:
        if not here and left < row.left:
            here = True
            steps, work = max(steps, newcomer.steps), work + newcomer.work
            if left - COMPANY * (steps * fixed + work) < KEPT * slack:
                return None
            least = min(least, (left - steps * fixed - work) / left)
        if row.steps > without_steps:
            without_steps = row.steps
        if row.steps > steps:
            steps = row.steps
        without_work += row.work
        work += row.work
        before, after = without_steps * fixed + without_work, steps * fixed + work
        if HELD * before <= row.left < HELD * after and here and row.weight >= newcomer.weight:
            return None
        if before <= row.left:
            least = min(least, (row.left - after) / row.left)
    if not here:
        steps, work = max(steps, newcomer.steps), work + newcomer.work
        if left - COMPANY * (steps * fixed + work) < KEPT * slack:
            return None
        least = min(least, (left - steps * fixed - work) / left)
    return least


def finish(newcomer: DeadlineRow, residents: Sequence[DeadlineRow], fixed: float) -> float:
    """Seconds until the newcomer is done, beside the rows whose deadlines are no later, as the test counts them."""
    ahead = [newcomer, *(row for row in residents if row.left <= newcomer.left)]
    return max(row.steps for row in ahead) * fixed + sum(row.work for row in ahead)


def hopeless(left: float, seconds: float) -> bool:
    """Whether a row that needs `seconds` alone cannot end within the `left` seconds."""
    return HOPELESS * seconds > left


def beyond_hope(left: Sequence[float], needs: Sequence[float]) -> list[int]:
    """Places of the rows of an instance that are hopeless.

    If all are, the one closest to its deadline is tried nevertheless: that takes time from no other row.
    """
    lost = [place for place, seconds in enumerate(needs) if hopeless(left[place], seconds)]
    if lost and len(lost) == len(needs):
        best = max(lost, key=lambda place: left[place] - needs[place])
        if left[best] > 0.0:
            lost.remove(best)
    return lost


def place_in(ends: Sequence[float], number: int) -> float:
    """Seconds until the `number`th place from now is free, when rows end after `ends` seconds and others follow.

    A few seconds if no row runs, as nothing is known then.
    """
    return min(LONGEST_WAIT, max(0.1, free_after(ends, number))) if ends else NOTHING_RUNS


def free_after(ends: Sequence[float], number: int) -> float:
    """The same without bounds; some row runs."""
    ordered = sorted(ends)
    return ordered[number - 1] if number <= len(ordered) else ordered[-1] * number / len(ordered)


def retry_after(backlog: float, instances: int) -> float:
    """Seconds until about half the admitted work with deadlines is done."""
    return min(LONGEST_WAIT, max(0.1, backlog / (2 * max(1, instances))))
