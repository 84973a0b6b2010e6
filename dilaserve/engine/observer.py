"""What watchers of requests hear of them: metrics, logs, traces. They change nothing."""

from typing import Protocol, TypeAlias

import msgspec

from dilaserve.scheduler.totals import Fate
from dilaserve.types import Decline, Emit, Fail, Finish, Refuse, Request, Usage


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has ended. `reason`: why, for the log; of an answer that is its finish reason.

    `tokens` are those of the answer that had become final. Instants are those of the engine's loop: `first_at` and
    `last_at` of the first and the last of them, None where there is none. `usage`: None where it is not known.
    """

    request: Request
    fate: Fate
    reason: str
    usage: Usage | None
    tokens: int
    first_at: float | None
    last_at: float | None
    ended_at: float

    @property
    def timed(self) -> bool:
        """Whether it has a deadline."""
        return self.request.slo.seconds is not None or self.request.slo.multiple is not None

    @property
    def deadline_fate(self) -> str:
        """`met`, `missed`, or what became of the request; empty without a deadline."""
        if not self.timed:
            return ""
        if self.fate != "answered" or self.usage is None:
            return self.fate
        return "met" if self.usage.deadline_met else "missed"

    @property
    def slack(self) -> float | None:
        """Seconds from the end of an answer to its deadline; below 0 for a late one, None without."""
        usage = self.usage
        if self.fate != "answered" or usage is None or usage.deadline is None:
            return None
        return usage.deadline - usage.queued - usage.served


class Observer(Protocol):
    """Hears of requests, on the engine's loop, before their clients do. It must not wait."""

    def emitted(self, request: Request, tokens: int, since: float | None, now: float) -> None:
        """So many tokens have become final; `since`: when the ones before did, None for the first."""

    def ended(self, ended: Ended) -> None: ...


Message: TypeAlias = Emit | Finish | Fail | Decline | Refuse


def fate_of(message: Finish | Fail | Decline | Refuse) -> tuple[Fate, str]:
    """What became of the request, and why."""
    match message:
        case Finish(_, reason):
            return ("cancelled", "the client left") if reason == "cancelled" else ("answered", reason)
        case Fail(_, reason):
            return "failed", reason
        case Decline(_, usage, _, never_feasible):
            if never_feasible:
                return "declined", "its deadline is shorter than the request takes alone"
            started = "could not be kept any more" if usage.steps else "could not be kept under the present load"
            return "declined", f"its deadline {started}"
        case Refuse():
            return "refused", "no place was left for it (--max-queue, --best-effort-backlog)"
