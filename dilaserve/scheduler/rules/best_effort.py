"""How much device time rows without an admitted deadline get on an instance that keeps deadlines.

A deficit counter per instance (as in deficit round robin; Shreedhar, Varghese, SIGCOMM 1995). Steps for rows with
deadlines add a share of their seconds to it. A best-effort row that goes before them takes what it adds to the step.
"""

MOST_SAVED = 0.5  # seconds that an instance saves up at most, so that no burst follows a long time without such rows
STEP = 0.1  # of the tightest deadline seen lately: the longest step without deadlines, as an arrival waits for its end


def may_lead(saved: float) -> bool:
    """Whether a best-effort row goes before rows with deadlines; `saved` seconds are negative after a long step."""
    return saved > 0.0


def after_step(saved: float, share: float, deadlines: float, taken: float) -> float:
    """The seconds saved up after a step of `deadlines` seconds, and `taken` more by the best-effort row that led it."""
    return min(MOST_SAVED, saved + share * deadlines - taken)
