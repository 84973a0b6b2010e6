"""The least of recent values, in constant memory."""

import math


class RecentMinimum:
    """The least value of the last `window` to three times `window` seconds; it keeps two numbers."""

    def __init__(self, window: float) -> None:
        self.window = window
        self.began = -math.inf
        self.before = self.least = math.inf

    def add(self, value: float, now: float) -> None:
        self.turn(now)
        self.least = min(self.least, value)

    def at(self, now: float) -> float:
        """Infinite if none came."""
        self.turn(now)
        return min(self.before, self.least)

    def peek(self, now: float) -> float:
        """What `at` gives, and nothing is forgotten."""
        windows = (now - self.began) / self.window
        if windows >= 1.0:
            return self.least if windows < 2.0 else math.inf
        return min(self.before, self.least)

    def turn(self, now: float) -> None:
        windows = (now - self.began) / self.window
        if windows >= 1.0:
            self.before = self.least if windows < 2.0 else math.inf
            self.began, self.least = now, math.inf
