"""What a calibration reports while it runs."""

from collections.abc import Callable

Seen = Callable[[str, int, int], None]  # what is measured, done, total


def quiet(device: str, done: int, total: int) -> None:
    """Nobody watches the weights being loaded."""


def unsaid(line: str) -> None:
    """Nobody reads what is said on the way."""
