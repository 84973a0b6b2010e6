"""A published checkpoint directory: config.json and safetensors, checked by their headers before anything is read.

No code that lies in the directory is ever run.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import safe_open

from dilaserve.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BUNDLED_MODELS = Path(__file__).absolute().parent.parent / "bundled"
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


def locate(model: str) -> Path:
    """The directory of a model: a bundled one by its name, else the path itself, wherever the program goes later."""
    bundled = {directory.name: directory for directory in BUNDLED_MODELS.iterdir()}
    try:
        return bundled[model] if model in bundled else Path(model).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # there is no such user, or no working directory
        raise CheckpointError(f"there is no model directory {model}: {error}") from error


class Tensors:
    """Open files of one checkpoint; `[name]` maps the tensor into memory without reading it."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.files[name]
        if file not in self.open:
            self.open[file] = safe_open(file, framework="pt")
        tensor: torch.Tensor = self.open[file].get_tensor(name)
        return tensor


class Checkpoint:
    """`directory` must hold config.json and all the shards; raises `CheckpointError` otherwise."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            there = directory.is_dir()
        except OSError as error:
            raise CheckpointError(f"cannot read the model directory {directory}: {error.strerror}") from error
        if not there:
            raise CheckpointError(f"there is no model directory {directory}; --model takes one")
        self.config = read_json(directory / "config.json")
        self.files = shards(directory)
        headers = {file: header(file) for file in set(self.files.values())}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.itemsize = 0
        for name, file in self.files.items():
            if name not in headers[file]:
                raise CheckpointError(f"{file} does not hold the tensor {name} that {INDEX} places there")
            entry = headers[file][name]
            if entry.dtype not in SIZES:
                raise CheckpointError(f"{name} in {file} has the type {entry.dtype}; expected one of {list(SIZES)}")
            self.shapes[name] = entry.shape
            self.itemsize = max(self.itemsize, SIZES[entry.dtype])

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(f"{self.directory / 'config.json'} names no architectures; is it a model?")
        return names[0]

    def field(self, name: str, kind: type, default: Any = None) -> Any:
        """A field of config.json; without a default it must be there. JSON's null counts as absent."""
        value = self.config.get(name)
        if value is None:
            value = default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.directory / 'config.json'}: {name} must be {kind.__name__}, not {value!r}")
        return value

    def expect(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor is there in its shape, or `CheckpointError` for the first that is not."""
        for name, shape in tensors.items():
            if name not in self.shapes:
                raise CheckpointError(f"{self.directory} lacks the tensor {name}; is a shard or its index missing?")
            if self.shapes[name] != shape:
                found, wanted = list(self.shapes[name]), list(shape)
                raise CheckpointError(f"{name} in {self.directory} has shape {found}; config.json asks for {wanted}")

    def tensors(self) -> Tensors:
        return Tensors(self.files)


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


def shards(directory: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    if (directory / INDEX).exists():
        names = read_json(directory / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{directory / INDEX} has no weight_map")
        return {name: directory / Path(str(file)).name for name, file in names.items()}
    if (directory / SINGLE).exists():
        return dict.fromkeys((name for name in header(directory / SINGLE)), directory / SINGLE)
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")


class Entry(msgspec.Struct):
    """One tensor in the table of a safetensors file."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


def header(file: Path) -> dict[str, Entry]:
    """The table at the start of a safetensors file, also checked against the file's length."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            limit = file.stat().st_size - 8
            raw = json.loads(stream.read(size)) if size <= limit else {}
        known = {name: entry for name, entry in raw.items() if name != "__metadata__"}
        entries = msgspec.convert(known, dict[str, Entry])
    except FileNotFoundError as error:
        raise CheckpointError(f"the shard {file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (struct.error, ValueError, RecursionError, AttributeError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{file} is not a safetensors file") from error
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if not entries or end + size > limit:
        raise CheckpointError(f"{file} is cut short; download it again")
    begin = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        nbytes = math.prod(entry.shape) * SIZES.get(entry.dtype, 0) or stop - start  # of other types nothing is known
        if (start, stop) != (begin, begin + nbytes):
            raise CheckpointError(f"{file} is damaged: {name} lies in bytes {start} to {stop}; download it again")
        begin = stop
    if begin + size != limit:
        raise CheckpointError(f"{file} is damaged: its tensors do not fill it; download it again")
    return entries
