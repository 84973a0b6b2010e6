"""A process that was started without standard streams gets ones that lead nowhere."""

import os
import sys

MODES = {0: "r", 1: "w", 2: "w"}


def ensure_standard_streams() -> None:
    """Open /dev/null wherever standard input, output or error is closed.

    Otherwise the next file or socket would take the free number, and what libraries print would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if closed(number):
            take(number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, MODES[number], closefd=False))


def closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False


def lead_nowhere(number: int) -> None:
    """From now on nothing that is written there fails."""
    take(number)


def take(number: int) -> None:
    """Open /dev/null under this number; children inherit it."""
    found = os.open(os.devnull, os.O_RDWR)
    if found != number:
        os.dup2(found, number)
        os.close(found)
    os.set_inheritable(number, True)
