"""How long to wait before something that has failed is tried again. Knows no clock and not what is tried."""

MOST_DOUBLINGS = 32  # beyond, a pause has reached any limit


def pause(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many failures in a row: none, `first`, twice that, …, `most`."""
    return min(most, first * 2.0 ** min(failures - 1, MOST_DOUBLINGS)) if failures > 0 else 0.0
