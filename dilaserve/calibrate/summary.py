"""What a calibration has found, as a table, and what makes it doubtful."""

from collections.abc import Iterator

from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.step_cost import StepCost

MOST_ERROR = 0.1  # mean error of the step costs above which deadlines are planned badly
FEWEST = 100  # problems of a task below which its drops say little


def table_of(quality: QualityProfile) -> list[tuple[str, ...]]:
    """A head, and for each measured task and threshold the steps of an answer and the drop of accuracy in points."""
    rows: list[tuple[str, ...]] = [("task", "problems", "threshold", "steps", "drop, points", "at most (90 %)")]
    for name, task in quality.tasks.items():
        for level, steps, mean, bound in zip(quality.levels, task.steps, task.mean_drop, task.drop, strict=False):
            figures = f"{level:g}", f"{steps:.1f}", f"{mean:.1f}", f"{bound:.1f}"
            rows.append((f"{name}, {task.accuracy:.1f} % right", str(task.samples), *figures))
    return rows


def doubts(quality: QualityProfile, law: StepCost) -> Iterator[str]:
    """A sentence for each figure that is not good enough, with what to do."""
    if law.error > MOST_ERROR:
        yield (
            f"step costs are {100 * law.error:.1f} % off in the mean, above {100 * MOST_ERROR:.0f} %: "
            "deadlines will be kept worse; calibrate again while nothing else uses the machine"
        )
    for name, task in quality.tasks.items():
        if task.steps and task.samples < FEWEST:
            yield (
                f"{name} has {task.samples} problems, and drops of accuracy from fewer than {FEWEST} are mostly noise; "
                "give it more with --problems and --per-task"
            )
