"""Deadlines by name (--slo-class), and the deadline that a request asks for."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, ConfigError, quoted
from dilaserve.types import Slo


class SloClass(NamedTuple):
    """A configured deadline: a multiple of the unloaded latency, or seconds, or neither; and what it is worth."""

    multiple: float | None
    seconds: float | None
    weight: float


def wanted(options: Options, classes: Mapping[str, SloClass]) -> Slo:
    """The deadline and its terms; raises `BadRequest` for an unknown class, or for a class and a deadline at once."""
    seconds = None if options.deadline_ms is None else options.deadline_ms / 1000
    multiple, weight = None, 2.0**options.priority
    if options.slo_class is not None:
        if seconds is not None:
            raise BadRequest("deadline_ms and slo_class exclude each other; give one", param="slo")
        if options.slo_class not in classes:
            known = ", ".join(sorted(classes)) or "none are configured (--slo-class)"
            raise BadRequest(f"unknown class {quoted(options.slo_class)}; known: {known}", param="slo_class")
        multiple, seconds, share = classes[options.slo_class]
        weight *= share
    return Slo(
        seconds=seconds,
        multiple=multiple,
        weight=weight,
        floor=options.min_confidence_threshold or 0.0,
        on_miss=options.on_miss,
        tenant=options.user,
        budget=options.accuracy_budget,
        task=options.task,
        name=options.slo_class or "",
        fixed=options.confidence_threshold is not None,
    )


CLASS = re.compile(
    r"(?P<name>[\w.-]+)=(?:(?P<x>\d+(?:\.\d+)?)x|(?P<ms>\d+(?:\.\d+)?)ms|none)(?:\*(?P<weight>\d+(?:\.\d+)?))?"
)


def parse_classes(text: str) -> dict[str, SloClass]:
    """`chat=2.0x*3,fast=800ms,batch=none` as classes by name; raises `ConfigError`."""
    classes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = CLASS.fullmatch(part)
        if not found or found["name"] in classes:
            raise ConfigError(
                f"--slo-class {part!r} is not NAME=2.0x, NAME=800ms or NAME=none, each once, with *WEIGHT behind",
                param="slo_class",
            )
        multiple = float(found["x"]) if found["x"] else None
        seconds = float(found["ms"]) / 1000 if found["ms"] else None
        if not all(0.0 < value < 1e9 for value in (multiple, seconds) if value is not None):
            raise ConfigError(f"--slo-class {part!r}: a deadline is above 0 and finite", param="slo_class")
        weight = float(found["weight"] or 1.0)
        if not 0.0 < weight < 1e9:
            raise ConfigError(f"--slo-class {part!r}: a weight is above 0 and finite", param="slo_class")
        classes[found["name"]] = SloClass(multiple, seconds, weight)
    return classes
