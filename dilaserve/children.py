"""How child processes are started, and all ended at once, whoever's program this is."""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_spawning = threading.Lock()


def start(process: Any) -> None:
    """Start a child; it inherits blocked SIGINT and SIGTERM, so that only its engine ends it."""
    with _spawning, blocked(signal.SIGINT, signal.SIGTERM), anonymous_main():
        process.start()


def kill() -> None:
    """End all children of this process, whatever they do."""
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def anonymous_main() -> Iterator[None]:
    """Hide the main script from multiprocessing, which would otherwise run it again in every child.

    So an embedding script needs no `if __name__ == "__main__"` guard, and a notebook works too.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
