"""Pictures of what was measured or simulated, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dilaserve.profile.decode_speed import ANY, QualityProfile
from dilaserve.profile.step_cost import Sample, StepCost

WIDE, TALL = 9.0, 4.2
GRID = {"alpha": 0.25, "linewidth": 0.6}
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "savefig.dpi": 150})


def step_cost(law: StepCost, samples: Sequence[Sample], file: Path) -> None:
    """Measured against predicted seconds, and the time of a step by its packed tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, TALL), layout="constrained")
    actual = [1000 * sample.seconds for sample in samples]
    predicted = [1000 * law.seconds(sample.features) for sample in samples]
    left.scatter(actual, predicted, s=12, alpha=0.7)
    ends = [min(actual), max(actual)]
    left.plot(ends, ends, color="black", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    left.set_title(f"mean error on held-out steps: {100 * law.error:.1f} %")
    right.scatter([sample.features.tokens for sample in samples], actual, s=12, alpha=0.7)
    right.set(xlabel="packed tokens", ylabel="step, ms", xscale="log", yscale="log", title="time of a step")
    for axes in (left, right):
        axes.grid(**GRID)
    saved(figure, file)


def quality(profile: QualityProfile, file: Path) -> None:
    """Steps and accuracy drop by threshold, a line a task."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, TALL), layout="constrained")
    for name, task in profile.tasks.items():
        if name == ANY:
            continue
        left.plot(profile.levels, task.steps, marker="o", markersize=3, label=name)
        (line,) = right.plot(profile.levels, task.mean_drop, marker="o", markersize=3, label=name)
        right.plot(profile.levels, task.drop, color=line.get_color(), linewidth=0.7, linestyle="--")
    left.set(xlabel="confidence threshold", ylabel="steps of a request", title="steps")
    right.set(xlabel="confidence threshold", ylabel="points", title="accuracy drop (dashed: 90 % bound)")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.grid(**GRID)
    left.legend(frameon=False)
    saved(figure, file)


def panels(count: int, title: str) -> tuple[Any, Sequence[Any]]:
    """A figure of so many panels that share their horizontal axis."""
    figure, axes = plt.subplots(count, 1, figsize=(WIDE, 1.7 * count), sharex=True, layout="constrained")
    figure.suptitle(title)
    for one in axes:
        one.grid(**GRID)
    return figure, axes


def saved(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
