"""Memory that was freed goes back to the system: glibc keeps it otherwise. Other C libraries are left alone."""

import ctypes
import os

# mallopt's parameters by the environment variable that sets the same, and what a server wants of them
WANTED = {
    "MALLOC_ARENA_MAX": (-8, 1),  # heaps; each thread's own would keep what was freed in it
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**17),  # bytes of blocks that are apart; else it rises with the largest body seen
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**17),  # free bytes at the end of the heap that are given back
}


def keep_small() -> None:
    """For a process that is a server and nothing else. What the environment says of the heap holds."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        for name, (option, value) in WANTED.items():
            if name not in os.environ:
                set_option(option, value)


def trim() -> None:
    """Give free pages back; releases the interpreter's lock meanwhile."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
