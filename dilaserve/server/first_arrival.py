"""When a request came to the first server that had it, as gateways say it in a header."""

import math
from collections.abc import Mapping

from dilaserve.engine.submit import MAX_DEADLINE
from dilaserve.errors import BadRequest, quoted

HEADER = "x-dilaserve-arrived-at"  # Unix seconds


def elapsed_ms(headers: Mapping[str, str], now: float) -> float | None:
    """Milliseconds since then, at `now` in Unix seconds; None without the header. Clocks differ: a time in the future
    counts as now. Raises `BadRequest`.
    """
    if (text := headers.get(HEADER)) is None:
        return None
    try:
        at = float(text)
    except ValueError:
        at = math.nan
    if not math.isfinite(at):
        raise BadRequest(f"the header {HEADER} is not a time in Unix seconds: {quoted(text)}", param=HEADER)
    found = max(0.0, (now - at) * 1000)
    if found > MAX_DEADLINE:
        raise BadRequest(f"the header {HEADER} is more than a day ago: {quoted(text)}", param=HEADER)
    return found
