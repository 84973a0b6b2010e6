"""Why a deadline was missed or a request declined, by where its time went. Knows neither the log nor Prometheus."""

from dilaserve.types import Usage

CAUSES = {
    "too_short": "the deadline is shorter than the request takes alone",
    "queue": "it waited for a row",
    "steps": "its steps took longer than expected or were shared",
    "between_steps": "it waited between steps",
    "restarts": "it lost its K/V {restarts} times and waited to go on",
}  # of deadlines that were not met: label in /metrics, sentence in the log


def cause(usage: Usage) -> str:
    """What took most of the time beyond that of the request alone, in words."""
    return CAUSES[cause_label(usage)].format(restarts=usage.restarts)


def cause_label(usage: Usage) -> str:
    """The same as a key of `CAUSES`."""
    if usage.deadline is not None and usage.alone >= usage.deadline:
        return "too_short"
    waits = {
        "queue": usage.queued,
        "steps": usage.stepping - usage.alone,
        "restarts" if usage.restarts else "between_steps": usage.served - usage.stepping,
    }
    return max(waits, key=lambda name: waits[name])
