"""OpenAI's wire as structs: what may come in, what is refused and why, and how it becomes the engine's options."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from dilaserve.config import CacheKind
from dilaserve.errors import BadRequest
from dilaserve.options import Options
from dilaserve.terms import DecodeRule, OnMiss

HALF = re.compile(rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])")
HALF_WITHIN = 2**18  # bytes of a body that is not JSON in which that reason is looked for
T = TypeVar("T")
N = TypeVar("N", int, float)
NO_SAMPLING = "masked diffusion has no token-by-token sampling to apply it to"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When the answer is wanted, and what becomes of it otherwise; `task` names a quality profile."""

    deadline_ms: float | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    on_miss: OnMiss | None = None
    priority: int | None = None
    min_confidence_threshold: float | None = None
    task: str | None = None


class Common(msgspec.Struct, kw_only=True):
    """Fields of both endpoints. null means the default everywhere."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # ours
    decode: DecodeRule | None = None
    confidence_threshold: float | None = None
    num_denoising_steps: int | None = None
    factor: float | None = None
    block_length: int | None = None
    cache: CacheKind | None = None
    refresh_interval: int | None = None
    ignore_eos: bool | None = None
    slo: Slo | None = None
    priority: int | None = None
    min_confidence_threshold: float | None = None
    # known, and refused unless at their default
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    response_format: Any = None
    suffix: Any = None
    best_of: Any = None
    top_logprobs: int | None = None


class Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[Part] | None = None
    tool_calls: Any = None


class ChatRequest(Common, kw_only=True):
    messages: list[Message]
    logprobs: bool | None = None


class CompletionRequest(Common, kw_only=True):
    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeRequest(msgspec.Struct):
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]


class Refusal(NamedTuple):
    """Values of a known field that change nothing, and why others cannot be honoured."""

    harmless: tuple[Any, ...]
    reason: str


REFUSALS = {
    "frequency_penalty": Refusal((0,), NO_SAMPLING),
    "presence_penalty": Refusal((0,), NO_SAMPLING),
    "logit_bias": Refusal(({},), NO_SAMPLING),
    "tools": Refusal(([],), "tools are not supported"),
    "tool_choice": Refusal(("none", "auto"), "tools are not supported"),
    "parallel_tool_calls": Refusal((True, False), "tools are not supported"),
    "functions": Refusal(([],), "functions are not supported"),
    "function_call": Refusal(("none", "auto"), "functions are not supported"),
    "audio": Refusal((), "this server answers in text"),
    "modalities": Refusal((["text"],), "this server answers in text"),
    "response_format": Refusal(({"type": "text"},), "only {'type': 'text'} is supported"),
    "suffix": Refusal(("",), "text after the answer is not supported"),
    "best_of": Refusal((1,), "use n"),
    "top_logprobs": Refusal((0,), "only the chosen token's probability is kept"),
}

_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
}


def decoded(body: bytes | bytearray, kind: type[T]) -> T:
    """The body as a request of this kind; `BadRequest` names the field that is wrong."""
    try:
        request: T = (_decoders.get(kind) or msgspec.json.Decoder(kind)).decode(body)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `")
        missing = re.search(r"missing required field `(\w+)`", text)
        places = [path.rstrip("`").removeprefix("$").removeprefix("."), missing[1] if missing else ""]
        param = ".".join(filter(None, places)) or None
        raise BadRequest(f"{param}: {text}" if param else text, param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if not body.strip():
            raise BadRequest("the body is empty; send JSON") from error
        if HALF.search(body, 0, HALF_WITHIN):
            raise BadRequest("the body is not valid JSON: a string holds half of a surrogate pair") from error
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    return request


def refuse(request: Common) -> None:
    """Raise `BadRequest` for a known field whose value cannot be honoured."""
    for name in request.__struct_fields__:
        value, refusal = getattr(request, name), REFUSALS.get(name)
        if refusal and value is not None and value not in refusal.harmless:
            raise BadRequest(f"{name} cannot be honoured: {refusal.reason}", param=name, code="unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")


def with_headers(request: Common, headers: Mapping[str, str]) -> None:
    """Take over what gateways put into headers that cannot touch the body; the body goes before."""
    slo, priority = request.slo or Slo(), request.priority
    if slo.class_ is None and slo.deadline_ms is None:
        milliseconds = number(headers, "x-slo-deadline-ms", float)
        slo = msgspec.structs.replace(slo, deadline_ms=milliseconds, class_=headers.get("x-slo-class"))
    if priority is None:
        priority = number(headers, "x-priority", int)
    request.slo, request.priority = slo, priority


def number(headers: Mapping[str, str], name: str, kind: Callable[[str], N]) -> N | None:
    if (text := headers.get(name)) is None:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise BadRequest(f"the header {name} is not a number: {text[:40]!r}", param=name) from error


def deadlines(request: Common) -> dict[str, Any]:
    """The engine's options that speak of deadlines; `user` is the tenant."""
    slo = request.slo or Slo()
    floor = request.min_confidence_threshold if slo.min_confidence_threshold is None else slo.min_confidence_threshold
    return {
        "deadline": None if slo.deadline_ms is None else slo.deadline_ms / 1000,
        "slo_class": slo.class_,
        "on_miss": slo.on_miss,
        "priority": request.priority if slo.priority is None else slo.priority,
        "min_confidence_threshold": floor,
        "task": slo.task,
        "tenant": request.user,
    }


def options(request: Common, choice: int) -> Options:
    """The engine's options for one of the choices; a given seed is counted up from choice to choice."""
    stop = request.stop
    given: dict[str, Any] = {
        "max_tokens": max_tokens(request),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": None if request.seed is None else request.seed + choice,
        "stop": (stop,) if isinstance(stop, str) else None if stop is None else tuple(stop),
        "refresh_interval": request.refresh_interval,
        "ignore_eos": request.ignore_eos,
    }
    own = ("decode", "confidence_threshold", "num_denoising_steps", "factor", "block_length", "cache")
    given |= {name: getattr(request, name) for name in own} | deadlines(request)
    return Options(**{name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def spelled(request: Common) -> Iterator[None]:
    """Errors name the field that the client has sent, where the engine calls it by another name."""
    try:
        yield
    except BadRequest as error:
        if error.param is None or (name := spellings(request).get(error.param)) is None:
            raise
        message = re.sub(rf"\b{error.param}\b", name, error.message) if name != "messages" else error.message
        raise BadRequest(message, param=name, code=error.code) from error


def spellings(request: Common) -> dict[str, str]:
    slo = request.slo or Slo()
    other = {
        "messages": isinstance(request, ChatRequest),
        "max_completion_tokens": request.max_completion_tokens is not None,
        "slo.priority": slo.priority is not None,
        "slo.min_confidence_threshold": slo.min_confidence_threshold is not None,
    }
    ours = "prompt", "max_tokens", "priority", "min_confidence_threshold"
    return {name: theirs for name, (theirs, sent) in zip(ours, other.items(), strict=True) if sent}


def max_tokens(request: Common) -> int | None:
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


def choices_wanted(request: Common, prompts: int, most: int, places: int) -> int:
    n = 1 if request.n is None else request.n
    limit, flag = min((most, "--max-choices"), (places, "--max-queue"))
    if not 1 <= n * prompts <= limit:
        param = "prompt" if prompts > limit else "n"
        raise BadRequest(
            f"n times the number of prompts must lie between 1 and {limit} ({flag}), not {n * prompts}",
            param=param,
        )
    return n


def conversation(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as the chat template takes them; text parts are joined."""
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    return [{"role": role(message, i), "content": content(message, i)} for i, message in enumerate(messages)]


def role(message: Message, i: int) -> str:
    if message.role not in ROLES:
        raise BadRequest(f"the role {message.role!r} is not one of {', '.join(ROLES)}", param=f"messages[{i}].role")
    return ROLES[message.role]


def content(message: Message, i: int) -> str:
    if message.tool_calls:
        raise BadRequest("tools are not supported", param=f"messages[{i}].tool_calls")
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise BadRequest("a message needs content", param=f"messages[{i}].content")
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise BadRequest(f"a content part of type {part.type!r} is not text", param=f"messages[{i}].content")
    return "".join(part.text or "" for part in message.content)


def prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """A completion's prompts: one text, several, token ids, or several lists of them."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if are_ids(prompt):
        return [list(prompt)]
    if prompt and all(isinstance(item, list) and are_ids(item) for item in prompt):
        return [list(item) for item in prompt]
    raise BadRequest("prompt must be a string, token ids, or a list of either", param="prompt")


def are_ids(items: list[Any]) -> bool:
    return set(map(type, items)) == {int}  # not bool
