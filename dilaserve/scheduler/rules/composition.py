"""Which rows share the next step of an instance."""

from collections.abc import Callable, Sequence

import msgspec


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A resident row as composition sees it.

    `tokens` and `seconds` are what it adds to the step; `slack` is what it can spare at its threshold (None: it has no
    deadline). Candidates are in the order of service.
    """

    key: int
    tokens: int
    seconds: float = 0.0
    slack: float | None = None


def in_order(candidates: Sequence[Candidate], max_tokens: int, cap: int) -> list[Candidate]:
    """As many as fit, and always the first."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        if len(chosen) >= cap:
            break
        if chosen and candidate.tokens > max_tokens:
            continue
        chosen.append(candidate)
        max_tokens -= candidate.tokens
    return chosen


def within_slack(candidates: Sequence[Candidate], max_tokens: int, cap: int) -> list[Candidate]:
    """The first, and those that cost the rows before them no more time than these can spare.

    A reuse row rides almost for free; a refresh is charged in full.
    """
    chosen: list[Candidate] = []
    spare = float("inf")
    for candidate in candidates:
        if len(chosen) >= cap:
            break
        if not chosen or (candidate.seconds <= spare and candidate.tokens <= max_tokens):
            if chosen:
                spare -= candidate.seconds
            chosen.append(candidate)
            max_tokens -= candidate.tokens
        if candidate.slack is not None and candidate.slack < spare:
            spare = candidate.slack
    return chosen


def within(candidates: Sequence[Candidate], seconds: float) -> list[Candidate]:
    """The first, and those behind it that together with it add no more than `seconds` to the step."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        if not chosen or candidate.seconds <= seconds:
            chosen.append(candidate)
            seconds -= candidate.seconds
    return chosen


Composition = Callable[[Sequence[Candidate], int, int], list[Candidate]]
COMPOSITIONS: dict[str, Composition] = {
    "fcfs": in_order,
    "edf": in_order,
    "least-slack": in_order,
    "composed": within_slack,
}
