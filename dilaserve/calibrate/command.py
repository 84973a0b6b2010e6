"""`dilaserve calibrate`: from flags to a profile, a table and plots; a run that was interrupted is gone on with."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import NamedTuple

from dilaserve.calibrate.answers import Questions, questions_from
from dilaserve.calibrate.calibrate import calibrate as measure
from dilaserve.calibrate.calibrate import subject
from dilaserve.calibrate.kept import Measurements, resumed
from dilaserve.calibrate.summary import doubts, table_of
from dilaserve.config import Config
from dilaserve.display import counting, show
from dilaserve.errors import ConfigError, Unavailable
from dilaserve.models import hub
from dilaserve.profile import profile_file
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.profile.step_cost import Sample, StepCost
from dilaserve.system import child_processes


class Found(NamedTuple):
    """A profile, and its step costs at the lowest degree, for the plot."""

    profile: ModelProfile
    samples: list[Sample]
    law: StepCost


def calibrate(settings: Config, extras: argparse.Namespace) -> None:
    """Measure, write the profile, print its table; raises `ConfigError`."""
    directory = hub.directory_of(settings.model.model, settings.model.revision)
    given = settings.scheduler.profile
    if given:
        profile_file.check_writable(Path(given))
    known = replaced(directory, given)
    questions = questions_from(extras.problems, extras.per_task)
    places, about = profile_file.places(directory, given), subject(settings, directory, questions)
    child_processes.fork_servers.divide(["dilaserve.worker.main"])
    with resumed(places, about, extras.restart, note) as (kept, file):
        found = measured(settings, questions, kept, file, known)
        written = profile_file.write(found.profile, directory, given)
        file.unlink()
    tell(found, written)
    if extras.plots:
        draw(found, extras.plots)


def measured(
    settings: Config, questions: Questions, kept: Measurements, file: Path, known: ModelProfile | None
) -> Found:
    """Everything that is not kept yet; says how to go on if that is interrupted."""
    try:
        with counting() as seen:
            return Found(*asyncio.run(measure(settings, questions, seen, kept, known, note)))
    except (KeyboardInterrupt, Unavailable):
        if kept:
            note(f"the same command goes on from what has been measured, which is kept in {file}")
        raise


def tell(found: Found, written: Path) -> None:
    law, quality = found.law, found.profile.quality
    print(f"step costs: {law.samples} kinds of steps, {100 * law.error:.1f} % mean error on those held out")
    show(table_of(quality))
    for line in doubts(quality, law):
        note(line)
    print(f"profile: {written}")


def draw(found: Found, folder: Path) -> None:
    from dilaserve.profile import plots

    plots.step_cost(found.law, found.samples, folder / "step-cost.png")
    plots.quality(found.profile.quality, folder / "quality.png")
    print(f"plots: {folder / 'step-cost.png'}, {folder / 'quality.png'}")


def note(line: str) -> None:
    print(f"dilaserve: {line}", file=sys.stderr, flush=True)


def replaced(directory: Path, given: str | None) -> ModelProfile | None:
    """The profile that is measured anew. None where there is none, or it cannot be read, which is said."""
    if given and not Path(given).exists():
        return None
    try:
        return profile_file.find(directory, given)
    except ConfigError as error:
        note(f"the old profile is replaced as a whole, other devices too: {error}")
        return None
