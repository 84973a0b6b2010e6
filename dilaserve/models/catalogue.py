"""What can be served, and from where: bundled models, those in the hub's cache, and the families by name."""

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dilaserve import models
from dilaserve.errors import CheckpointError
from dilaserve.models import hub
from dilaserve.models.checkpoint import BUNDLED_MODELS, Checkpoint

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors, as torch says them


class KnownModel(msgspec.Struct, frozen=True):
    """A checkpoint on this machine. `name` is what --model takes; `problem` says why it cannot be served as it is."""

    name: str
    path: str
    family: str
    architecture: str
    parameters: int | None = None
    dtype: str | None = None  # of most of its elements
    problem: str | None = None


class KnownFamily(msgspec.Struct, frozen=True):
    """`examples` are names on the hub."""

    name: str
    architectures: tuple[str, ...]
    caches: tuple[str, ...]
    examples: tuple[str, ...]


class Catalogue(msgspec.Struct, frozen=True):
    bundled: list[KnownModel]
    cached: list[KnownModel]
    cache: str  # the directory of the hub's cache
    families: list[KnownFamily]


def catalogue() -> Catalogue:
    """Reads the headers of every checkpoint whose architecture is served, and nothing of others."""
    bundled = [(directory.name, directory) for directory in sorted(BUNDLED_MODELS.iterdir())]
    cache = hub.cache()
    return Catalogue(known(bundled), known(hub.snapshots(cache)), str(cache), families())


def known(named: list[tuple[str, Path]]) -> list[KnownModel]:
    found = [described(name, directory) for name, directory in named]
    return [model for model in found if model is not None]


def described(name: str, directory: Path) -> KnownModel | None:
    """What is in a directory; None for models of other architectures, and what is no model."""
    try:
        architecture = models.architecture_of(directory)
    except CheckpointError:
        return None
    family = models.FAMILIES.get(architecture)
    if family is None:
        return None
    about = KnownModel(name, str(directory), family.title or architecture, architecture)
    try:
        checkpoint = Checkpoint(directory)
        spec = models.describe(checkpoint)
    except CheckpointError as error:
        return msgspec.structs.replace(about, problem=error.message)
    return msgspec.structs.replace(about, parameters=spec.parameters, dtype=most_common_type(checkpoint))


def most_common_type(checkpoint: Checkpoint) -> str:
    elements: dict[str, int] = {}
    for name, kind in checkpoint.types.items():
        elements[kind] = elements.get(kind, 0) + math.prod(checkpoint.shapes[name])
    kind = max(elements, key=lambda one: elements[one])
    return TYPES.get(kind, kind)


def families() -> list[KnownFamily]:
    """The families, in the order in which they are known; those of one title are one."""
    found: dict[str, KnownFamily] = {}
    for architecture, family in models.FAMILIES.items():
        name = family.title or architecture
        before = found.get(name, KnownFamily(name, (), family.caches, ()))
        examples = tuple(dict.fromkeys((*before.examples, *family.examples)))
        found[name] = KnownFamily(name, (*before.architectures, architecture), family.caches, examples)
    return list(found.values())


def lines(catalogue: Catalogue) -> Iterator[str]:
    """The catalogue as text."""
    yield "bundled"
    yield from map(line, catalogue.bundled)
    yield f"in the hub's cache, {catalogue.cache}"
    yield from map(line, catalogue.cached)
    if not catalogue.cached:
        yield "  none of these families"
    yield "families, with their architectures, cache kinds and names on the hub"
    for family in catalogue.families:
        yield f"  {family.name}: {', '.join(family.architectures)}; {', '.join(family.caches)}"
        yield from (f"    --model {example}" for example in family.examples)


def line(model: KnownModel) -> str:
    if model.parameters is None:
        return f"  {model.name}  {model.family}  cannot be served: {model.problem}"
    return f"  {model.name}  {model.family}  {counted(model.parameters)} parameters  {model.dtype}  {model.path}"


def counted(parameters: int) -> str:
    """A count of parameters with three digits."""
    unit, divisor = next((one for one in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if parameters >= one[1]), ("", 1.0))
    return f"{parameters / divisor:.3g}{' ' if unit else ''}{unit}"
