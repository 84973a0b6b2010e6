"""What SIGTERM and SIGINT do to the command line while no event loop handles them. Imports nothing that takes time."""

import os
import signal
import sys
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STRAGGLERS = 2.0  # seconds that threads and children get to end, once everything that matters is done
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides
_code: int | None = None  # with which the process leaves; None: this is somebody else's program


def leave_at_once(code: int) -> None:
    """From now on either signal ends the process with this exit code, without a word.

    An exception would not do: during an import it may be swallowed, or leave a module half made.
    """
    global _code
    _code = code
    for number in SIGNALS:
        signal.signal(number, _leave)


def raise_keyboard_interrupt() -> None:
    """From now on either signal raises `KeyboardInterrupt`, so that what runs can tidy up."""
    if _code is not None:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler)


def raise_system_exit() -> None:
    """From now on SIGTERM raises `SystemExit`, so that a terminal gets its settings back, and SIGINT an interrupt."""
    if _code is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_code))


def leave_soon(code: int) -> None:
    """Leave with this exit code in a few seconds, whatever threads are still busy with."""
    if _code is not None:
        timer = threading.Timer(STRAGGLERS, _exit, [code])
        timer.daemon = True
        timer.start()


def _leave(number: int, frame: FrameType | None) -> None:
    _exit(_code or 0)


def _exit(code: int) -> None:
    kill = getattr(sys.modules.get("dilaserve.system.child_processes"), "kill", None)  # it may be half imported
    if kill:
        kill()
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(code)
