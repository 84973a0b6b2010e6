"""Figures with their goals, printed as Markdown. Knows nothing of what was measured."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """One measured figure. `reached` is None for a figure without a goal."""

    what: str
    value: str
    goal: str = ""
    reached: bool | None = None


def none_of(what: str, count: int) -> Figure:
    """A count that must be zero."""
    return Figure(what, f"{count:,}", "0", count == 0)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def told(figures: Sequence[Figure]) -> bool:
    """Print the figures; True if every goal is reached."""
    words = {None: "", True: "yes", False: "**no**"}
    print(
        table(["figure", "measured", "goal", "reached"], [[*figure[:3], words[figure.reached]] for figure in figures])
    )
    return all(figure.reached is not False for figure in figures)
