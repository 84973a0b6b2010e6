"""Reads files of a model directory, which anybody may have made: regular files only, and none past a bound."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

from dilaserve.errors import CheckpointError

MOST_JSON = 16 * 2**20  # bytes of a configuration, an index or a profile
MOST_TABLE = 100_000_000  # bytes of tokenizer.json, and of the table of a safetensors file, as its own library has it
MOST_TEMPLATE = 2**20  # bytes of a chat template


def present(file: Path) -> bool:
    """Whether there is such a file; raises `OSError` where that cannot be found out."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(file: Path, most: int | None = None) -> int:
    """Bytes of a regular file; raises `OSError` for anything else and for more than `most` bytes."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes and may have {most}", str(file))
    return found.st_size


def read(file: Path, most: int) -> bytes:
    """The whole file; raises `OSError` with a reason in `strerror`."""
    size(file, most)
    with file.open("rb") as stream:
        return stream.read(most)


def read_json(file: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """A JSON object; raises `CheckpointError`."""
    try:
        value = json.loads(read(file, most))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


def read_json_if_present(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file; raises `CheckpointError`."""
    try:
        if not present(file):
            return {}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    return read_json(file)
