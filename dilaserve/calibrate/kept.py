"""What a calibration has measured so far, kept in a file from which the next run goes on.

Knows files and nothing of models. The file is JSON lines: first what is measured, then one line for each measurement,
appended in one write as soon as it is there. A line that a crash has cut off is left out.
"""

import contextlib
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dilaserve.errors import ConfigError
from dilaserve.profile.step_cost import Features


class AnswerCount(NamedTuple):
    """How many steps of an answer did the same: by level, part of the canvas, bin of masks left, tokens unmasked."""

    level: int
    part: int
    bin: int
    unmasked: int
    times: int


class MeasuredAnswer(msgspec.Struct, frozen=True, tag="answer"):
    """`problem` is its place among those of the task."""

    task: str
    level: int
    problem: int
    text: str
    steps: int
    counts: tuple[AnswerCount, ...]


class MeasuredStep(msgspec.Struct, frozen=True, tag="step"):
    """Seconds of one kind of step relative to the `usual` step timed beside it; `turn`: the round of measurements."""

    degree: int
    yardstick: str  # the usual step's layout
    layout: str
    turn: int
    features: Features
    ratio: float
    usual: float  # seconds


class Subject(msgspec.Struct, frozen=True, tag="subject"):
    """What is measured, by name: measurements of another subject are of no use."""

    settings: dict[str, str]


Line = Subject | MeasuredAnswer | MeasuredStep
AnswerKey = tuple[str, int, int]  # task, level, problem
StepKey = tuple[int, str, str, int]  # degree, yardstick, layout, turn
DECODER = msgspec.json.Decoder(Line)


class Measurements:
    """Answers and steps by what they measure. What is added also goes to the file, where there is one."""

    def __init__(self, file: io.FileIO | None = None) -> None:
        self.file = file
        self.answers: dict[AnswerKey, MeasuredAnswer] = {}
        self.steps: dict[StepKey, MeasuredStep] = {}

    def __len__(self) -> int:
        return len(self.answers) + len(self.steps)

    def add(self, one: MeasuredAnswer | MeasuredStep) -> None:
        """Raises `ConfigError` where the file cannot be written."""
        self.take(one)
        if self.file:
            append(self.file, one)

    def take(self, one: MeasuredAnswer | MeasuredStep) -> None:
        match one:
            case MeasuredAnswer():
                self.answers[one.task, one.level, one.problem] = one
            case MeasuredStep():
                self.steps[one.degree, one.yardstick, one.layout, one.turn] = one

    def taken_from(self, lines: Sequence[bytes]) -> int:
        """Take in the lines after the first, up to one that is damaged; returns the bytes of the lines that are not."""
        whole = sum(map(len, lines[:1]))
        for line in lines[1:]:
            one = decoded(line)
            if one is None or isinstance(one, Subject):
                break
            self.take(one)
            whole += len(line)
        return whole


@contextlib.contextmanager
def resumed(
    places: Sequence[Path], settings: Mapping[str, str], restart: bool, say: Callable[[str], None]
) -> Iterator[tuple[Measurements, Path]]:
    """The measurements of an earlier run, and the file to which more are added.

    The file is OUTPUT.partial, where OUTPUT is the first of the profile's `places` beside which it can be written.

    Measurements of other settings are dropped, and with `restart` all are. A file that has none is removed at the end,
    any other stays until the caller removes it. `say` gets what is dropped or gone on from. Raises `ConfigError`.
    """
    stream, path = opened([place.with_name(place.name + ".partial") for place in places])
    with stream:
        found, wanted = Measurements(stream), Subject(dict(settings))
        lines = [] if restart else stream.readall().splitlines(keepends=True)
        if lines and (reason := unfit(lines[0], wanted)):
            say(f"{path} is started over: {reason}")
            lines = []
        stream.truncate(found.taken_from(lines))
        if not lines:
            append(stream, wanted)
        if found:
            counts = f"{len(found.answers)} answers and {len(found.steps)} timings of steps"
            say(f"going on from {counts} in {path}; --restart measures them again")
        try:
            yield found, path
        finally:
            if not found:
                path.unlink(missing_ok=True)


def opened(paths: Sequence[Path]) -> tuple[io.FileIO, Path]:
    """The first of these files that can be appended to, locked, at its beginning."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = io.FileIO(path, "a+")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise ConfigError(f"another calibration writes {path}; wait until it has ended") from error
            reason = error.strerror
            continue
        stream.seek(0)
        return stream, path
    raise ConfigError(f"measurements cannot be kept in {paths[-1]}: {reason}; name a writable file with --profile")


def unfit(head: bytes, wanted: Subject) -> str | None:
    """Why a file with this first line is of no use."""
    there = decoded(head)
    if not isinstance(there, Subject):
        return "it is damaged"
    old, new = there.settings, wanted.settings
    others = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return f"it was measured with another {', '.join(others)}" if others else None


def decoded(line: bytes) -> Line | None:
    """None for a line that is cut off or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        one: Line = DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return one


def append(stream: io.FileIO, line: Line) -> None:
    text = msgspec.json.encode(line) + b"\n"
    try:
        if stream.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise ConfigError(f"measurements cannot be kept in {stream.name}: {error.strerror}") from error
