"""One line in the log for each request that has ended: what it was, where its time went, and what became of it."""

import logging
import re
from typing import Any

from dilaserve.engine.observer import Ended
from dilaserve.server.lateness import cause
from dilaserve.types import Request

log = logging.getLogger("dilaserve.requests")
LEVELS = {"failed": logging.ERROR, "refused": logging.WARNING, "declined": logging.WARNING}
WORD = re.compile(r"[\w.-]+", re.ASCII)


class RequestLog:
    """An observer of requests. `keyed`: fields are keys of a JSON line, so the message does not repeat them."""

    def __init__(self, keyed: bool) -> None:
        self.keyed = keyed

    def emitted(self, request: Request, tokens: int, since: float | None, now: float) -> None:
        """Nothing is logged while a request runs."""

    def ended(self, ended: Ended) -> None:
        level = LEVELS.get(ended.fate, logging.INFO)
        if log.isEnabledFor(level):
            known = fields(ended)
            rest = "" if self.keyed else f": {pairs(known)}"
            log.log(level, "request %s %s%s", ended.request.id, ended.fate, rest, extra=known)


def fields(ended: Ended) -> dict[str, Any]:
    """All that the line says, in its order; seconds unless the name says otherwise."""
    request, usage = ended.request, ended.usage
    known: dict[str, Any] = {"request_id": request.id, "fate": ended.fate, "reason": ended.reason}
    known |= {"tenant": request.slo.tenant, "class": request.slo.name, "deadline_fate": ended.deadline_fate}
    known |= {"prompt_tokens": request.prompt_tokens, "tokens": ended.tokens, "max_tokens": request.max_tokens}
    if usage:
        known |= {
            "steps": usage.steps,
            "refreshes": usage.refreshes,
            "restarts": usage.restarts,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "queued": usage.queued,
            "served": usage.served,
            "stepping": usage.stepping,
            "alone": usage.alone,
            "first_token": None if ended.first_at is None else ended.first_at - request.arrived_at,
            "deadline": usage.deadline,
            "slack": ended.slack,
            "min_threshold": usage.min_threshold,
            "mean_threshold": usage.mean_threshold,
            "expected_accuracy_drop": usage.expected_accuracy_drop,
        }
        if ended.deadline_fate in ("missed", "declined"):
            known["cause"] = cause(usage)
    return {name: rounded(value) for name, value in known.items() if value not in (None, "")}


def rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def pairs(known: dict[str, Any]) -> str:
    """The fields as name=value, but for those that begin the line."""
    return " ".join(f"{name}={spelled(value)}" for name, value in known.items() if name not in ("request_id", "fate"))


def spelled(value: Any) -> str:
    """A number with four digits, or a text, in quotes where it is no single word."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if WORD.fullmatch(text) else repr(text)
