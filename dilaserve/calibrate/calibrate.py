"""Measure a model on this machine: seconds of a step by what it computes, steps and accuracy by threshold and task.

Both on the real executor. The result is one profile file, which the server then loads by itself, and two plots.
"""

import datetime
import platform
from collections.abc import Callable
from pathlib import Path

from dilaserve.calibrate.answers import duration, questions_from
from dilaserve.calibrate.progress import Seen, quiet, unsaid
from dilaserve.calibrate.quality import quality
from dilaserve.calibrate.step_timing import step_costs
from dilaserve.config import Config
from dilaserve.engine.assembly import Parts, real
from dilaserve.engine.engine import Engine
from dilaserve.executor.executor import Progress
from dilaserve.profile import profile_file
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.profile.step_cost import Sample, StepCost, fit
from dilaserve.transport.devices import listed


def unmeasured(config: Config, progress: Progress) -> Parts:
    """The model as if it had no profile, whatever there is: that has other levels, or is damaged."""
    return real(config, progress, measured=False)


async def calibrate(
    config: Config,
    problems: Path | None,
    per_task: int,
    seen: Seen,
    known: ModelProfile | None = None,
    say: Callable[[str], None] = unsaid,
) -> tuple[ModelProfile, list[Sample], StepCost]:
    """Measure quality, then step costs; those of other devices are taken from `known`. The profile is not written.

    `say` first gets how long it will take.
    """
    questions = questions_from(problems, per_task)
    device = listed(config.device.devices)[0]
    async with Engine(config, quiet, unmeasured) as engine:
        say(await duration(engine, questions))
        measured_quality = await quality(engine, questions, seen)
        model = engine.model
    samples = await step_costs(config, model.max_model_len, seen, unmeasured)
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


def machine() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
