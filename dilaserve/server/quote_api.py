"""GET /v1/quote: the query as the engine's options, and its answer in milliseconds. It submits nothing."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from dilaserve.config import CacheKind
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest, quoted, shortened
from dilaserve.server import openai
from dilaserve.server.api_keys import Tenant
from dilaserve.server.schema import Common, Slo
from dilaserve.types import DecodeRule, OnMiss, Quote
from dilaserve.validation import complaint

Ask = Callable[[int, Options], Awaitable[Quote]]  # tokens of the prompt, and options
NAMES = {"slo_class": "class", "prompt": "prompt_tokens", "slo": "class"}  # the engine's names of parameters


class QuoteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request that might be submitted, by the length of its prompt."""

    prompt_tokens: int
    max_tokens: int | None = None
    min_tokens: int | None = None
    deadline_ms: float | None = None
    elapsed_ms: float | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    on_miss: OnMiss | None = None
    priority: int | None = None
    min_confidence_threshold: float | None = None
    task: str | None = None
    user: str | None = None
    decode: DecodeRule | None = None
    confidence_threshold: float | None = None
    num_denoising_steps: int | None = None
    factor: float | None = None
    block_length: int | None = None
    cache: CacheKind | None = None
    model: str | None = None


ABOUT = {  # what `openapi.FIELDS` does not say
    "prompt_tokens": "tokens of the prompt, as /tokenize counts them",
    "class": "a deadline by name (--slo-class)",
    "task": "names a quality profile",
}
SLO = ("deadline_ms", "elapsed_ms", "class_", "on_miss", "min_confidence_threshold", "task")
SHARED = (
    *("model", "max_tokens", "min_tokens", "priority", "user", "decode", "confidence_threshold"),
    *("num_denoising_steps", "factor", "block_length", "cache"),
)


def asked(query: Mapping[str, str]) -> QuoteRequest:
    """Raises `BadRequest`, which names the parameter."""
    known = [field.encode_name for field in msgspec.structs.fields(QuoteRequest)]
    if unknown := next((name for name in query if name not in known), None):
        words = f"there is no parameter {quoted(unknown)}; known: {', '.join(known)}"
        raise BadRequest(words, param=shortened(unknown))
    try:
        return msgspec.convert(dict(query), QuoteRequest, strict=False)
    except msgspec.ValidationError as error:
        raise complaint(error, QuoteRequest, root="the query") from error


async def answer(ask: Ask, wish: QuoteRequest, tenant: Tenant | None) -> dict[str, Any]:
    """The quote as JSON. Raises `BadRequest`, which names the parameter, and `Unavailable` while draining."""
    request = Common(
        slo=Slo(**{name: getattr(wish, name) for name in SLO}), **{name: getattr(wish, name) for name in SHARED}
    )
    try:
        found = await ask(wish.prompt_tokens, openai.options(request, 0, tenant))
    except BadRequest as error:
        name = error.param or ""
        message = re.sub(r"\bslo_class\b", "class", error.message)
        raise BadRequest(message, param=NAMES.get(name, name) or None, code=error.code) from error
    return {
        "admitted": found.admitted,
        "met": found.met,
        "deadline_ms": milliseconds(found.deadline),
        "slack_ms": milliseconds(found.slack),
        "confidence_threshold": found.threshold,
        "never_feasible": found.never_feasible,
        "retry_after_ms": milliseconds(found.retry_after),
        "wait_ms": milliseconds(found.wait),
        "finish_ms": milliseconds(found.finish),
        "running": found.running,
        "waiting": found.waiting,
    }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
