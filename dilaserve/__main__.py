"""`python -m dilaserve`, which is also the command `dilaserve`."""

import sys
from typing import NoReturn

from dilaserve.system import signals

FINITE = {
    "simulate",
    "calibrate",
    "models",
    "config",
    "completion",
    "chat",
    "bench",
}  # commands that are cut short when they are interrupted; a server just ends
INTERRUPTED = 130


def run() -> NoReturn:
    """A signal ends the process quietly at any moment; the handlers stand before anything that takes time to import."""
    signals.leave_at_once(INTERRUPTED if FINITE.intersection(sys.argv[1:2]) else 0)
    from dilaserve.cli import main

    code = main()
    signals.leave_at_once(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
