"""Who is in the next step of an instance."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A resident row: when its request arrived, and the packed tokens its next step needs."""

    key: int
    arrived_at: float
    tokens: int


def fcfs(residents: Sequence[Candidate], max_tokens: int) -> list[int]:
    """Keys of the rows that step now: in order of arrival, as many as fit, and always the first."""
    chosen: list[int] = []
    for candidate in sorted(residents, key=lambda candidate: candidate.arrived_at):
        if chosen and candidate.tokens > max_tokens:
            continue
        chosen.append(candidate.key)
        max_tokens -= candidate.tokens
    return chosen


Composition = Callable[[Sequence[Candidate], int], list[int]]
COMPOSITIONS: dict[str, Composition] = {"fcfs": fcfs}
