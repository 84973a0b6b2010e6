"""Measure a model on this machine: seconds of a step by what it computes, steps and accuracy by threshold and task.

Both on the real executor. The result is one profile file, which the server then loads by itself, and two plots.
"""

import datetime
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import msgspec

from dilaserve import __version__
from dilaserve.calibrate.answers import Questions, duration
from dilaserve.calibrate.kept import Measurements
from dilaserve.calibrate.progress import Seen, quiet, unsaid
from dilaserve.calibrate.quality import answers_of, quality
from dilaserve.calibrate.step_timing import step_costs
from dilaserve.config import Config
from dilaserve.engine.assembly import Parts, real
from dilaserve.engine.engine import Engine
from dilaserve.executor.executor import Progress
from dilaserve.profile import profile_file
from dilaserve.profile.decode_speed import LEVELS
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.profile.step_cost import Sample, StepCost, fit
from dilaserve.transport.devices import listed

UNTOLD = ("profile", "revision", "served_model_name")  # settings that change nothing of what is measured


def unmeasured(config: Config, progress: Progress) -> Parts:
    """The model as if it had no profile, whatever there is: that has other levels, or is damaged."""
    return real(config, progress, measured=False)


async def calibrate(
    config: Config,
    questions: Questions,
    seen: Seen,
    measured: Measurements,
    known: ModelProfile | None = None,
    say: Callable[[str], None] = unsaid,
) -> tuple[ModelProfile, list[Sample], StepCost]:
    """Measure quality, then step costs, except what is `measured` already; costs of other devices are taken from
    `known`. The profile is not written.

    `say` first gets how long it will take.
    """
    device = listed(config.device.devices)[0]
    async with Engine(config, quiet, unmeasured) as engine:
        if missing := answers_of(questions) - len(measured.answers):
            say(await duration(engine, questions, missing))
        measured_quality = await quality(engine, questions, seen, measured)
        model = engine.model
    samples = await step_costs(config, model.max_model_len, seen, measured, unmeasured)
    laws = {degree: fit(taken, experts=model.experts) for degree, taken in samples.items()}
    costs: dict[str, StepCost] = {
        **(known.costs if known else {}),
        **{profile_file.cost_key(device, degree): law for degree, law in laws.items()},
    }
    profile = ModelProfile(
        model=model.name,
        made=datetime.date.today().isoformat(),
        machine=machine(),
        costs=costs,
        quality=measured_quality,
    )
    least = min(laws)
    return profile, samples[least], laws[least]


def subject(config: Config, directory: Path, questions: Questions) -> dict[str, str]:
    """What is measured, by name: measurements with another subject say nothing of this one."""
    weights = [(file.name, file.stat()) for file in sorted(directory.glob("*.safetensors"))]
    groups = config.model, config.device, config.decode, config.scheduler
    settings = {name: str(value) for group in groups for name, value in msgspec.structs.asdict(group).items()}
    named = {
        "model": str(directory.resolve()),
        "weights": digest([(name, found.st_size, found.st_mtime_ns) for name, found in weights]),
        "devices": ",".join(listed(config.device.devices)),
        "machine": machine(),
        "problems": digest(questions),
        "thresholds": ", ".join(map(str, LEVELS)),
        "version": __version__,
    }
    return {name: value for name, value in (settings | named).items() if name not in UNTOLD}


def digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()


def machine() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
