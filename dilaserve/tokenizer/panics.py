"""Libraries that are written in Rust panic where Python raises, with an exception that `except Exception` lets pass."""

import contextlib
from collections.abc import Iterator

PANICS = "pyo3_runtime"  # the module that the exception says it is from; it cannot be imported


class Panic(Exception):
    """A library has panicked; the cause is its own exception."""


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Raise `Panic` for a panic, so that it is handled like other errors of a library."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != PANICS:
            raise
        raise Panic(f"the library panicked: {error}") from error
