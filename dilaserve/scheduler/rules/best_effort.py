"""How much device time rows without an admitted deadline get on an instance that keeps deadlines.

A deficit counter per instance (as in deficit round robin; Shreedhar, Varghese, SIGCOMM 1995). Steps for rows with
deadlines add a share of their seconds to it. A best-effort row that goes before them takes what it adds to the step.
"""

MOST_SAVED = 0.5  # seconds that an instance saves for best-effort rows at most; bounds their bursts
STEP = 0.1  # share of the tightest recent deadline that a step without deadlines may take: an arrival waits for its end


def may_lead(saved: float) -> bool:
    """Whether a best-effort row goes before rows with deadlines; `saved` seconds are negative after a long step."""
    return saved > 0.0


def after_step(saved: float, share: float, deadlines: float, taken: float) -> float:
    """The seconds saved up after a step of `deadlines` seconds, and `taken` more by the best-effort row that led it."""
    return min(MOST_SAVED, saved + share * deadlines - taken)
