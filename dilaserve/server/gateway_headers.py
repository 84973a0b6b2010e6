"""Headers that gateways of inference set (llm-d, gateway-api-inference-extension): how fast, of which class, whose.

It knows headers and nothing of bodies.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Self, TypeVar

from dilaserve.engine.submit import MAX_DEADLINE, MAX_TENANT_LENGTH
from dilaserve.errors import BadRequest, quoted
from dilaserve.validation import whole

N = TypeVar("N", int, float)
TTFT, TPOT = "x-slo-ttft-ms", "x-slo-tpot-ms"  # milliseconds to the first token; milliseconds for each one behind it
OBJECTIVE = "x-gateway-inference-objective"
FAIRNESS_ID = "x-gateway-inference-fairness-id"


class AskedSlo(NamedTuple):
    """A deadline in milliseconds or the name of a class, never both, and what of the headers was not honoured."""

    deadline_ms: float | None = None
    class_: str | None = None
    warnings: tuple[str, ...] = ()

    def warned(self, about: str) -> Self:
        return self._replace(warnings=(*self.warnings, about))


def slo(headers: Mapping[str, str], tokens: int, streamed: bool, classes: Collection[str]) -> AskedSlo:
    """What the headers ask of an answer of at most so many tokens; latencies go before an objective.

    Raises `BadRequest`, which names the header.
    """
    found, objective = deadline(headers, tokens, streamed), headers.get(OBJECTIVE)
    if not objective:
        return found
    if found.deadline_ms is not None:
        return found.warned(f"{OBJECTIVE} was ignored: {TTFT} gives a deadline")
    if objective not in classes:
        return found.warned(f"{OBJECTIVE} was ignored: {quoted(objective)} is no class here (--slo-class)")
    return found._replace(class_=objective)


def deadline(headers: Mapping[str, str], tokens: int, streamed: bool) -> AskedSlo:
    """The deadline of the whole answer, and a warning where the latencies give none.

    Tokens come a block at a time, so the two latencies hold together: the first token in time, and each of the others
    in its own. The time to the first token is a deadline by itself where the client sees no token before the last.
    """
    first, each = latency(headers, TTFT), latency(headers, TPOT)
    if first is None:
        alone = f"{TPOT} was ignored: it makes a deadline only together with {TTFT}"
        return AskedSlo() if each is None else AskedSlo().warned(alone)
    if each is None and streamed and tokens > 1:
        return AskedSlo().warned(f"{TTFT} was ignored: of a stream it makes a deadline only together with {TPOT}")
    found = first + (each or 0.0) * max(0, tokens - 1)
    if found > MAX_DEADLINE:
        raise BadRequest(
            f"{TTFT} and {TPOT} make a deadline of {found:.0f} ms for {tokens} tokens; {MAX_DEADLINE:.0f} (a day) is "
            "the most",
            param=TPOT,
        )
    return AskedSlo(found)


def latency(headers: Mapping[str, str], name: str) -> float | None:
    """Milliseconds; raises `BadRequest`."""
    found = number(headers, name, float)
    if found is not None and not 0.0 < found <= MAX_DEADLINE:  # NaN is not
        about = f"the header {name} must be above 0 and at most {MAX_DEADLINE:.0f} (a day)"
        raise BadRequest(f"{about}, not {quoted(headers[name])}", param=name)
    return found


def number(headers: Mapping[str, str], name: str, kind: Callable[[str], N]) -> N | None:
    """Raises `BadRequest` for a header that is none."""
    if (text := headers.get(name)) is None:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise BadRequest(f"the header {name} is not a number: {quoted(text)}", param=name) from error


def tenant(headers: Mapping[str, str]) -> str | None:
    """Raises `BadRequest` for a name that no tenant can have."""
    name = headers.get(FAIRNESS_ID)
    if name is not None and len(name) > MAX_TENANT_LENGTH:
        about = f"the header {FAIRNESS_ID} has at most {MAX_TENANT_LENGTH} characters, not {len(name)}"
        raise BadRequest(about, param=FAIRNESS_ID)
    return whole(name, FAIRNESS_ID) if name else None
