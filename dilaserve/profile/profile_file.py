"""The profile of a model: what its steps cost on this machine, and what thresholds do to its steps and accuracy.

A JSON file beside the model, or in the cache directory where that cannot be written.
"""

import hashlib
import logging
import os
import re
import tempfile
from itertools import zip_longest
from operator import mul
from pathlib import Path

import msgspec

from dilaserve.errors import ConfigError
from dilaserve.profile.decode_speed import ANY, BINS, PARTS, Law, Laws, QualityProfile, TaskProfile
from dilaserve.profile.step_cost import DENSE, KNOTS, ExpertCounts, Features, StepCost, weights_of
from dilaserve.system import files

log = logging.getLogger(__name__)
FILE = "dilaserve-profile.json"
NUMBERS = re.compile(rb"\[\s+([-+.\de,\s]+?)\s+\]")  # a list of numbers, which is to stand on one line
DAY = 86400.0  # seconds, which no step takes
ROW = Features(32, 32 * 256, 256, 32, 1)
UNKNOWN_DROPS = (0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 12.0)  # points by level, for a model that nobody has measured
UNKNOWN_PACES = (2.5, 2.8, 3.1, 3.5, 4.0, 4.5, 5.5)  # tokens a step by level


class ModelProfile(msgspec.Struct, frozen=True, kw_only=True):
    """`costs` by kind of device and tensor-parallel degree, such as "cpu x1"."""

    model: str
    made: str
    machine: str
    costs: dict[str, StepCost]
    quality: QualityProfile
    measured: bool = True


def cost_key(device: str, degree: int = 1) -> str:
    return f"{device.partition(':')[0]} x{degree}"


def cache_file(directory: Path) -> Path:
    """Where the profile of a model lies whose directory is not ours to write to; there, of a user without a home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return directory / FILE
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
    return root / "dilaserve" / f"{directory.name}-{name}.json"


def find(directory: Path, given: str | None) -> ModelProfile | None:
    """The profile that was given, or the one beside the model or in the cache; None when there is none."""
    if given is not None:
        return read(Path(given))
    for file in (cache_file(directory), directory / FILE):
        try:
            there = file.exists()
        except OSError as error:
            log.warning("no profile is looked for in %s: %s", file.parent, error.strerror)
            continue
        if there:
            return read(file)
    return None


def read(file: Path) -> ModelProfile:
    """Raises `ConfigError` with the reason."""
    try:
        raw = files.read(file, files.MOST_JSON)
    except (OSError, ValueError) as error:  # ValueError: no file has such a name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the profile {file}: {reason}", param="profile") from error
    try:
        profile = msgspec.json.decode(raw, type=ModelProfile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"the profile {file} is damaged: {error}; run `dilaserve calibrate`", param="profile"
        ) from error
    if ANY not in profile.quality.tasks:
        raise ConfigError(f"the profile {file} has no task {ANY!r}; run `dilaserve calibrate`", param="profile")
    if not all(map(whole_cost, profile.costs.values())) or not profile.costs or not whole_quality(profile.quality):
        reason = "a table has the wrong length, or costs are nothing or more than a day a step"
        raise ConfigError(f"the profile {file} is damaged: {reason}; run `dilaserve calibrate`", param="profile")
    return profile


def whole_cost(law: StepCost) -> bool:
    """Every step costs something, one of a single row less than a day, and no coefficient is missing."""
    parts = weights_of(law).tolist()
    sane = 0.0 <= min(parts) <= max(parts) < DAY and law.fixed + law.token > 0.0
    most, chosen = law.experts
    sane = sane and 0 <= chosen <= most and (law.expert == 0.0 or (law.expert > 0.0 and chosen > 0))
    return len(law.bends) == len(law.knots) > 0 and sane and law.seconds(ROW) < DAY


def whole_quality(quality: QualityProfile) -> bool:
    """Tables by level, part and bin have all their entries."""
    levels = len(quality.levels)
    return levels > 0 and all(
        len(task.laws) == len(task.drop) == len(task.mean_drop) == levels
        and len(task.steps) in (0, levels)
        and len(task.by_length) == (len(task.lengths) + 1 if task.lengths else 0)
        and all(whole_laws(laws, levels) for laws in (task.laws, *task.by_length))
        for task in quality.tasks.values()
    )


def whole_laws(laws: Laws, levels: int) -> bool:
    return len(laws) == levels and all(
        len(parts) == PARTS and all(len(law.unmasked) == len(BINS) for law in parts) for parts in laws
    )


def check_writable(file: Path) -> None:
    """Raises `ConfigError` where a profile could not be written; better before the measurement than after it."""
    try:
        if file.is_dir():
            raise ConfigError(f"the profile cannot be written to {file}: it is a directory", param="profile")
        with tempfile.NamedTemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"the profile cannot be written to {file}: {error.strerror}", param="profile") from error


def places(directory: Path, given: str | None) -> list[Path]:
    """Where a profile is written, if it can be: to the `given` file, else beside the model, else in the cache."""
    return [Path(given)] if given else [directory / FILE, cache_file(directory)]


def write(profile: ModelProfile, directory: Path, given: str | None = None) -> Path:
    """To the first of its `places` that can be written; returns the file."""
    text = NUMBERS.sub(lambda found: b"[" + b" ".join(found[1].split()) + b"]", indented(profile))
    beside, cached = directory / FILE, cache_file(directory)
    for file in places(directory, given):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".new")
            temporary.write_bytes(text)
            temporary.replace(file)
            if file == beside != cached:
                cached.unlink(missing_ok=True)  # it would be found first
        except OSError as error:
            reason = error.strerror
            continue
        return file
    raise ConfigError(f"the profile cannot be written, at last to {file}: {reason}")


def indented(profile: ModelProfile) -> bytes:
    return msgspec.json.format(msgspec.json.encode(profile), indent=1)


def guessed(
    model: str, device: str, experts: ExpertCounts = DENSE, part_length: int | None = None, block_length: int = 32
) -> ModelProfile:
    """A profile for a model that was never measured; the server learns the rest while it serves.

    `part_length`: positions of a block that are unmasked before the others, as in `FamilyTraits`.
    """
    fixed, token = (0.005, 2e-4) if device == "cpu" else (0.006, 3e-5)
    bends = (0.0,) * len(KNOTS)
    law = StepCost(
        fixed=fixed, token=token, bends=bends, attention=0.0, projection=0.0, row=0.0, experts=experts, guess=True
    )
    laws = tuple((pace(tokens, part_length=part_length),) * PARTS for tokens in UNKNOWN_PACES)
    task = TaskProfile(laws=laws, drop=UNKNOWN_DROPS, mean_drop=UNKNOWN_DROPS)
    quality = QualityProfile(tasks={ANY: task}, block_length=block_length)
    return ModelProfile(
        model=model, made="", machine="", costs={cost_key(device): law}, quality=quality, measured=False
    )


def pace(tokens: float, weight: float = 20.0, part_length: int | None = None) -> Law:
    """A law under which a step unmasks 1 + a geometric number of tokens, `tokens` in the mean, but none beyond the
    part of the block that it is in.
    """
    rows = []
    for least, most in zip((0, *BINS), BINS, strict=False):
        odds = cut(tokens, most) if part_length is None else cut_by_parts(tokens, least, most, part_length)
        rows.append(tuple(round(weight * p, 4) for p in odds))
    return Law(tuple(rows))


def cut_by_parts(tokens: float, least: int, most: int, part_length: int) -> list[float]:
    """The same where `least` + 1 to `most` masks are left in the block: the mean, by how often steps begin with them.

    That is once where a part begins, and with the chance 1 / `tokens` elsewhere, as geometric numbers are memoryless.
    """
    ends = [(masks - 1) % part_length + 1 for masks in range(least + 1, most + 1)]
    shares = [1.0 if end == part_length else 1.0 / tokens for end in ends]
    columns = zip_longest(*(cut(tokens, end) for end in ends), fillvalue=0.0)
    return [sum(map(mul, column, shares)) / sum(shares) for column in columns]


def cut(tokens: float, most: int) -> list[float]:
    """The odds of 0, 1, … tokens in a step that unmasks at most so many."""
    stop = 1.0 / tokens
    return [0.0] + [stop * (1 - stop) ** (d - 1) for d in range(1, most)] + [(1 - stop) ** (most - 1)]
