"""Memory that was freed goes back to the system: the C library keeps it otherwise."""

import ctypes


def trim() -> None:
    """Give free pages back, where the C library can (glibc); releases the interpreter's lock meanwhile."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
