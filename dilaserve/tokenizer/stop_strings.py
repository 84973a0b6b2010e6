"""Stop strings: where an answer is cut, and what of it may be shown before that is known."""

from collections.abc import Sequence


class StopStrings:
    """Cuts text at the stop string that is complete first, and holds back what might be the beginning of one.

    Where the cut lies does not depend on the pieces in which the text comes. `shown`: behind the stop string, else
    before it.
    """

    def __init__(self, stops: Sequence[str], shown: bool = False) -> None:
        self.stops, self.shown = stops, shown
        self.held = ""
        self.spared = 0  # characters of `held` within which no stop string may end
        self.found = False
        self.stop: str | None = None  # the one that was found

    def pass_over(self, text: str) -> str:
        """As `push`, but no stop string may end in this text; one may begin in it."""
        self.spared = len(self.held) + len(text)
        return self.push(text)

    def push(self, text: str) -> str:
        """The part of all text so far that is safe to show now. After `found`, nothing."""
        if not self.stops or self.found:
            return "" if self.found else text
        self.held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self.first(stop)) >= 0]
        end, start = min(ends, default=(0, 0))
        self.found, cut = bool(ends), end if self.shown else start
        self.stop = self.held[start:end] or None
        keep = 0 if self.found else max(overlap(self.held, stop) for stop in self.stops)
        shown = self.held[:cut] if self.found else self.held[: len(self.held) - keep]
        self.held = self.held[len(shown) :]
        self.spared = max(0, self.spared - len(shown))
        return shown

    def first(self, stop: str) -> int:
        """Where the stop string stands first that ends behind what is spared; -1 if nowhere."""
        return self.held.find(stop, max(0, self.spared - len(stop) + 1))

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        rest, self.held = ("" if self.found else self.held), ""
        return rest


def overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
