"""Memory that this process and its children map. Knows bytes and descriptors, nothing of what lies there."""

import mmap
import os
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import torch

from dilaserve.errors import ConfigError
from dilaserve.system import child_processes, host

FILES = "/dev/shm"  # where shared memory is a file, if the system gives none without a name


class SharedBytes:
    """`size` bytes, zeros at first, as a tensor. Pickled to a child that inherits `fd`, it maps the same memory."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        self.size = size
        self.fd = reserved(size) if fd is None else fd
        weakref.finalize(self, os.close, self.fd)
        self.tensor = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is not None:  # to a child of multiprocessing, which learns here what it inherits
            return received, (self.size, DupFd(self.fd))
        return SharedBytes, (self.size, self.fd)


def received(size: int, inherited: Any) -> SharedBytes:
    return SharedBytes(size, inherited.detach())


def reserved(size: int) -> int:
    """A descriptor of so many bytes that are there: to write to some that are not would be fatal.

    Raises `ConfigError` where they do not fit.
    """
    if size > (there := host.memory_left().nbytes):
        raise ConfigError(
            f"the request table takes {size / 2**20:.0f} MiB of shared memory and {there / 2**20:.0f} are free; "
            "lower --max-queue or --max-model-len"
        )
    fd = child_processes.heritable(nameless())
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"the system has no {size / 2**20:.0f} MiB of shared memory for the request table ({error.strerror}); "
            f"give {FILES} more room, or lower --max-queue or --max-model-len"
        ) from error
    return fd


def nameless() -> int:
    """An empty file in memory, which needs no directory; where that is not allowed, one in `FILES`.

    Raises `ConfigError` where there is neither.
    """
    try:
        return os.memfd_create("dilaserve")
    except OSError as refused:
        reason = refused.strerror
    try:
        with tempfile.TemporaryFile(dir=FILES, buffering=0) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"there is no shared memory for the workers: memfd_create: {reason}, {FILES}: {error.strerror}; "
            f"mount a tmpfs at {FILES} that this user can write to"
        ) from error
