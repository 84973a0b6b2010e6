"""How long a set of rows needs when they run together on one instance."""

from collections.abc import Sequence

from dilaserve.types import Load


def alone(load: Load, fixed: float) -> float:
    """Seconds that a row takes with no other row in its steps; `fixed` are the seconds that every step takes."""
    return load.steps * fixed + load.work


def ends(loads: Sequence[Load], fixed: float) -> list[float]:
    """Seconds until each row of an instance is done when all run together, the earliest first.

    Until the row with s steps is done, every longer row does s of its own steps, too.
    """
    ordered = sorted(loads, key=lambda load: load.steps)
    per_step = sum(load.work / load.steps for load in ordered if load.steps)
    done, found = 0.0, []
    for load in ordered:
        if load.steps:
            per_step -= load.work / load.steps
        done += load.work
        found.append(load.steps * (fixed + max(0.0, per_step)) + done)
    return found


def end_beside(load: Load, others: Sequence[Load], fixed: float) -> float:
    """Seconds until a row is done that runs together with others: its place among `ends` of all."""
    shared = sum(other.work * min(1.0, load.steps / other.steps) for other in others if other.steps)
    return load.steps * fixed + load.work + shared


def load(steps: float, refreshes: float, drift: float, refresh: float, reuse: float) -> Load:
    """The load of a row with these steps and refreshes ahead, `refresh` and `reuse` being its marginal step times."""
    steps *= drift
    if refreshes > steps:
        refreshes = steps
    return Load(steps, refreshes * refresh + (steps - refreshes) * reuse)


def drifted(observed: float, expected: float) -> float:
    """How much slower than expected this request fills its canvas, drawn towards 1 while little is known."""
    ratio = (8.0 + observed) / (8.0 + expected)
    return 0.6 if ratio < 0.6 else 1.8 if ratio > 1.8 else ratio
