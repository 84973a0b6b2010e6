"""Where the workers of torch.distributed find each other."""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from dilaserve.errors import ConfigError
from dilaserve.worker.main import WorkerJob


@contextlib.contextmanager
def rendezvous(jobs: list[WorkerJob]) -> Iterator[str]:
    """A directory for files through which torch.distributed introduces workers; none is made where it is not needed."""
    if all(job.backend == "shm" for job in jobs):
        yield ""
        return
    owner = os.getpid()
    try:
        place = tempfile.mkdtemp(prefix=f"dilaserve-{owner}-")
    except OSError as error:
        raise ConfigError(f"workers have no directory to meet in: {error}; set TMPDIR to one") from error
    atexit.register(remove, place, owner)
    try:
        yield place
    finally:
        remove(place, owner)


def remove(place: str, owner: int) -> None:
    """By the process that has made it, not by forks of it."""
    if os.getpid() == owner:
        shutil.rmtree(place, ignore_errors=True)
