"""What a problem is, and how answers are read."""

import re
from typing import NamedTuple


class Problem(NamedTuple):
    """A user's message and the answer that is expected."""

    task: str
    prompt: str
    answer: str


def squeezed(text: str) -> str:
    return " ".join(text.split())


def last_number(text: str) -> int | None:
    """The number behind the last `####`, or None."""
    found = re.findall(r"####\s*(-?\d+)", text)
    return int(found[-1]) if found else None


def operations(text: str) -> list[str]:
    """What looks like `+3=14`, in order."""
    return re.findall(r"[+-]\d+=\d+", text)
