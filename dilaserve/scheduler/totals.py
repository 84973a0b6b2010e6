"""What became of every request, each counted once when it ends, and the device seconds that requests took."""

from collections.abc import Sequence
from typing import Literal

from dilaserve.types import RowResult

Fate = Literal["answered", "declined", "cancelled", "failed", "refused"]
FATES: dict[Fate, str] = {
    "answered": "finished with a whole answer",
    "declined": "declined because the deadline cannot be met, at once or later",
    "cancelled": "left by the client",
    "failed": "given up because of an error on the server",
    "refused": "refused because the queue is full",
}


class Totals:
    """Sums since the start, which reports and metrics both read; the simulator's many engines need no registry.

    `fates` counts all requests that have ended. `deadlines` counts those with a deadline: "met" or "missed" for an
    answered one, else the fate. `device` are the seconds of steps on requests that ended, `wasted` the part on requests
    that missed their deadline through the server's fault.
    """

    def __init__(self) -> None:
        self.received = self.prompt_tokens = self.cached_prompt_tokens = 0
        self.fates: dict[str, int] = dict.fromkeys(FATES, 0)
        self.deadlines = dict.fromkeys(("met", "missed", *FATES), 0)
        del self.deadlines["answered"]
        self.device = self.wasted = 0.0
        self.steps = {"refresh": 0, "reuse": 0}  # of batches, by what they had: a row that refreshes, or none
        self.unmasked = 0  # tokens

    def stepped(self, refreshing: bool, results: Sequence[RowResult]) -> None:
        """Count a step of a batch, and the tokens that it unmasked."""
        self.steps["refresh" if refreshing else "reuse"] += 1
        self.unmasked += sum(result.unmasked for result in results)

    def prompt(self, tokens: int, cached: int) -> None:
        """Count the prompt of a request that has ended, and the part whose K/V another request had computed."""
        self.prompt_tokens += tokens
        self.cached_prompt_tokens += cached

    def ended(self, fate: Fate, met: bool | None) -> None:
        """Count a request; `met`: whether it met its deadline; None: it has none."""
        self.fates[fate] += 1
        if met is not None:
            self.deadlines[fate if fate != "answered" else "met" if met else "missed"] += 1

    def spent(self, seconds: float, wasted: bool) -> None:
        """Add device seconds of a request that has ended, or of the step that it was in when it ended."""
        self.device += seconds
        self.wasted += seconds if wasted else 0.0
