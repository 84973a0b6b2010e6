"""A published checkpoint directory: config.json and safetensors, checked by their headers before anything is read.

No code that lies in the directory is ever run.
"""

import copy
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from dilaserve.errors import CheckpointError
from dilaserve.system import files
from dilaserve.system.files import read_json, read_json_if_present
from dilaserve.tokenizer import byte_level_bpe

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BUNDLED_MODELS = Path(__file__).absolute().parent.parent / "bundled"
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
MOST_NAMED = 10  # tensors of a kind that an error names
MOST_SHOWN = 100  # characters of a wrong value that an error repeats
Bounds = tuple[float, float]
Number = TypeVar("Number", int, float)


def locate(model: str) -> Path:
    """The directory of a model: a bundled one by its name, else the path itself, wherever the program goes later."""
    bundled = {directory.name: directory for directory in BUNDLED_MODELS.iterdir()}
    try:
        return bundled[model] if model in bundled else Path(model).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # there is no such user, or no working directory
        raise CheckpointError(f"there is no model directory {model}: {error}") from error


def shown(value: object) -> str:
    """A value as an error repeats it."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


class Tensors:
    """Open files of one checkpoint; `[name]` maps the tensor into memory without reading it."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> "torch.Tensor":
        file = self.files[name]
        if file not in self.open:
            self.open[file] = safe_open(file, framework="pt")
        tensor: torch.Tensor = self.open[file].get_tensor(name)
        return tensor


class Checkpoint:
    """`directory` must hold config.json and all the shards; raises `CheckpointError` otherwise."""

    source = "config.json"  # the file that `config` is from

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            there = directory.is_dir()
        except OSError as error:
            raise CheckpointError(f"cannot read the model directory {directory}: {error.strerror}") from error
        if not there:
            raise CheckpointError(
                f"there is no model directory {directory}; --model takes one, or org/name of a model on the hub"
            )
        self.config = read_json(directory / "config.json")
        self.files = shards(directory)
        headers = {file: header(file) for file in set(self.files.values())}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.unused: list[str] = []  # tensors that the model has no part for; known after `expect`
        for name, file in self.files.items():
            if name not in headers[file]:
                raise CheckpointError(f"{file} does not hold the tensor {name} that {INDEX} places there")
            entry = headers[file][name]
            self.shapes[name], self.types[name] = entry.shape, entry.dtype

    @classmethod
    def outline(cls, directory: Path) -> "Checkpoint":
        """The config.json alone of a model whose weights are not here: no file, and so no tensor."""
        found = cls.__new__(cls)
        found.directory, found.config = directory, read_json(directory / "config.json")
        found.files, found.shapes, found.types, found.unused = {}, {}, {}, []
        return found

    @property
    def architecture(self) -> str:
        return first_architecture(self.directory / "config.json", self.config)

    def field(self, name: str, kind: type, default: Any = None) -> Any:
        """A field of config.json; without a default it must be there. JSON's null counts as absent."""
        value = self.config.get(name)
        if value is None:
            value = default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.wrong(f"{name} must be {kind.__name__}, not {shown(value)}")
        return value

    def part(self, name: str) -> "Checkpoint":
        """The checkpoint with only the fields inside this field, which must be an object; without it there are none."""
        found = copy.copy(self)
        found.config = self.field(name, dict, {})
        return found

    def generation(self) -> "Checkpoint":
        """The checkpoint with the fields of generation_config.json in place of config.json's; there may be none."""
        found = copy.copy(self)
        found.config, found.source = read_json_if_present(self.directory / GENERATION), GENERATION
        return found

    def expect_fields(self, supported: Mapping[str, tuple[object, ...]]) -> None:
        """Raise `CheckpointError` for the first field whose value is not one that is supported; absent ones are."""
        for name, allowed in supported.items():
            value = self.config.get(name)
            if value is not None and value not in allowed:
                raise self.wrong(f"{name} {shown(value)} is not supported, only {allowed[0]!r}")

    def whole(self, name: str, bounds: Bounds, default: int | None = None) -> int:
        """A whole number of config.json between bounds, which belong to it."""
        value: int = self.field(name, int, default)
        return self.bounded(name, value, bounds)

    def number(self, name: str, bounds: Bounds, default: float | None = None) -> float:
        """A number of config.json between bounds, which NaN and infinity never are."""
        value = self.config.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(f"{name} must be a number, not {shown(value)}")
        return float(self.bounded(name, value, bounds))

    def bounded(self, name: str, value: Number, bounds: Bounds) -> Number:
        least, most = bounds
        if not least <= value <= most:
            raise self.wrong(f"{name} {shown(value)} does not lie between {least} and {most}")
        return value

    def end_ids(self, vocabulary: int) -> tuple[int, ...]:
        """Ids of the tokens that end an answer, as config.json and generation_config.json name them: one or a list."""
        generation = read_json_if_present(self.directory / GENERATION)
        found = []
        for file, fields in (("config.json", self.config), (GENERATION, generation)):
            named = fields.get("eos_token_id")
            for id in named if isinstance(named, list) else [] if named is None else [named]:
                if type(id) is not int:
                    raise self.wrong(f"eos_token_id must be a token id or a list of them, not {shown(named)}", file)
                if not 0 <= id < vocabulary:
                    raise self.wrong(f"eos_token_id {shown(id)} does not lie between 0 and {vocabulary - 1}", file)
                found.append(id)
        return tuple(sorted(set(found)))

    def added_token(self, text: str) -> int:
        """The id of a token that was added to the tokenizer; raises `CheckpointError` where there is none."""
        for token, id in self.added_tokens():
            if token == text:
                return id
        raise self.wrong(f"it has no mask_token_id, and no token {text} was added to the tokenizer")

    def added_tokens(self) -> list[tuple[str, int]]:
        """Tokens that were added to the tokenizer, by tokenizer.json or by the files that stand in its place."""
        file = self.directory / TOKENIZER
        if byte_level_bpe.present(self.directory) and not files.present(file):
            return [(token.content, id) for id, token in byte_level_bpe.added_tokens(self.directory).items()]
        table = read_json(file, files.MOST_TABLE).get("added_tokens") or ()
        found = [(one.get("content"), one.get("id")) for one in table if isinstance(one, dict)]
        return [(token, id) for token, id in found if isinstance(token, str) and type(id) is int]

    def wrong(self, reason: str, file: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.directory / (file or self.source)}: {reason}")

    def expect(self, tensors: Mapping[str, tuple[int, ...]], layers: str, ignored: Iterable[str] = ()) -> None:
        """Check that `tensors` are all there in their shapes, and that no others are part of the same computation.

        A tensor that is left over is an error in a layer (names that begin with `layers`), or where a module of it is
        expected: a bias, a norm of queries or one layer more changes the arithmetic, and without it answers would be
        wrong while nothing says so. Others, such as a head for another task, are never reached: `unused` names them.
        Those that match a pattern of `ignored` do not count. `CheckpointError` names up to ten tensors of each kind.
        """
        left = [name for name in self.shapes if name not in tensors and not any(fnmatch(name, one) for one in ignored)]
        modules = {name.rpartition(".")[0] for name in tensors}
        unknown = [name for name in left if name.startswith(layers) or name.rpartition(".")[0] in modules]
        self.unused = sorted(set(left) - set(unknown))
        missing = [name for name in tensors if name not in self.shapes]
        reasons = [
            tensors_sentence("lacks", missing, "; is a shard or its index missing?"),
            tensors_sentence("holds", self.misshapen(tensors)),
            tensors_sentence("holds", self.unreadable(tensors), f", and only {', '.join(SIZES)} can be read"),
            tensors_sentence("holds", unknown, f" that {self.architecture} with this config.json does not have"),
        ]
        if found := [reason for reason in reasons if reason]:
            raise CheckpointError(f"{self.directory} {', and it '.join(found)}")

    def misshapen(self, tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
        return [
            f"{name} of shape {list(self.shapes[name])}, where config.json asks for {list(shape)}"
            for name, shape in tensors.items()
            if name in self.shapes and self.shapes[name] != shape
        ]

    def unreadable(self, tensors: Iterable[str]) -> list[str]:
        kinds = {name: self.types[name] for name in tensors if name in self.types}
        return [f"{name} of the type {kind}" for name, kind in kinds.items() if kind not in SIZES]

    @property
    def itemsize(self) -> int:
        """Bytes of an element, in the widest type of the tensors that can be read."""
        return max((SIZES.get(kind, 0) for kind in self.types.values()), default=0)

    def tensors(self) -> Tensors:
        return Tensors(self.files)


def first_architecture(file: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{file} names no architectures; is it a model?")
    return names[0]


def tensors_sentence(verb: str, tensors: list[str], rest: str = "") -> str:
    """What is wrong with so many tensors, the first of which are named; nothing where there are none."""
    if not tensors:
        return ""
    more = f" and {len(tensors) - MOST_NAMED} more" if len(tensors) > MOST_NAMED else ""
    count = "the tensor" if len(tensors) == 1 else f"{len(tensors)} tensors:"
    return f"{verb} {count} {', '.join(tensors[:MOST_NAMED])}{more}{rest}"


def shards(directory: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it. Where a directory was saved twice, the single file counts, as it does
    for transformers.
    """
    single, index = directory / SINGLE, directory / INDEX
    try:
        if files.present(single):
            return dict.fromkeys(header(single), single)
        if not files.present(index):
            raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    except OSError as error:
        raise CheckpointError(f"cannot read the model directory {directory}: {error.strerror}") from error
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map")
    return {name: directory / Path(str(file)).name for name, file in names.items()}


class Entry(NamedTuple):
    """One tensor in the table of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def header(file: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file. Its library bounds the table, and checks it against the file's length."""
    try:
        files.size(file)
        with safe_open(file, framework="np") as opened:  # `pt` would import torch
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            entries = {name: Entry(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"the shard {file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); download it again") from error
    if not entries:
        raise CheckpointError(f"{file} holds no tensors; download it again")
    return entries
