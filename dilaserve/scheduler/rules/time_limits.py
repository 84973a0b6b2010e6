"""How long a step, or the forming of an instance, may take before it counts as hung."""

OVERDUE = 20.0  # factor on the predicted seconds after which a step counts as hung
UNKNOWN = 10.0  # factor on --step-timeout while step costs are not measured: a first compile, a slow CPU
MOST_DOUBLINGS = 10  # kills in a row after which the limit grows no further


def step_limit(timeout: float, predicted: float, known: bool, kills: int) -> float:
    """Seconds for a step of so many predicted seconds; `known`: its cost law is no guess.

    It doubles with each of the `kills` before, so that steps that are merely slow finish at last, and are learned from.
    """
    return max(timeout if known else UNKNOWN * timeout, OVERDUE * predicted) * doubled(kills)


def forming_limit(timeout: float, kills: int) -> float:
    """Seconds for an instance to be formed, after so many `kills` in a row of others that were not formed in time."""
    return timeout * doubled(kills)


def doubled(kills: int) -> float:
    return 2.0 ** min(kills, MOST_DOUBLINGS)
