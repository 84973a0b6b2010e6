"""What may come in: each endpoint's body as a struct, how bytes become one, and what is said of those that do not."""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from dilaserve.config import CacheKind
from dilaserve.engine.prompts import Message, Part
from dilaserve.errors import BadRequest, shortened
from dilaserve.server import unsupported
from dilaserve.server.unsupported import Unsupported
from dilaserve.types import DecodeRule, OnMiss
from dilaserve.validation import complaint

T = TypeVar("T")
LikelihoodKind = Literal["pseudo", "monte-carlo"]
HALF = re.compile(rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])")
HALF_WITHIN = 2**18  # bytes of a body that is not JSON in which that reason is looked for
MAX_DEFAULT = 8192  # bytes of a value that can be a default; longer ones are refused unread


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_canvas: bool | None = None


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When the answer is wanted, and what becomes of it otherwise; `task` names a quality profile."""

    deadline_ms: float | None = None
    elapsed_ms: float | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    on_miss: OnMiss | None = None
    priority: int | None = None
    min_confidence_threshold: float | None = None
    task: str | None = None


class Shared(msgspec.Struct, kw_only=True):
    """Fields of every endpoint that answers. null means the default everywhere."""

    model: str | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    # ours
    decode: DecodeRule | None = None
    confidence_threshold: float | None = None
    num_denoising_steps: int | None = None
    factor: float | None = None
    editing_threshold: float | None = None
    block_length: int | None = None
    cache: CacheKind | None = None
    refresh_interval: int | None = None
    ignore_eos: bool | None = None
    resume_token_ids: list[int] | None = None
    slo: Slo | None = None
    priority: int | None = None
    min_confidence_threshold: float | None = None


class Common(Shared, kw_only=True):
    """Fields of chat and completions."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None


class ChatRequest(Common, kw_only=True):
    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None


class LikelihoodWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the likelihood of a prompt is estimated, see dilaserve/engine/likelihood.py.

    `groups` (8) and `rounds` (4) belong to pseudo, `samples` (128) to monte-carlo.
    """

    kind: LikelihoodKind = "pseudo"
    groups: int | None = None
    rounds: int | None = None
    samples: int | None = None
    start: int = 1


class CompletionRequest(Common, kw_only=True):
    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    likelihood: LikelihoodKind | LikelihoodWish | None = None


class InputItem(msgspec.Struct, frozen=True):
    """A message, a call of a tool, or what came of one, in the `input` of /v1/responses."""

    type: str = "message"
    role: str | None = None
    content: str | list[str | Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Any = None
    input: str | None = None
    output: str | list[str | Part] | None = None


class ResponsesStreamOptions(msgspec.Struct, frozen=True):
    include_obfuscation: bool | None = None  # padding against readers of an encrypted line: there never is any


class ResponsesRequest(Shared, kw_only=True):
    """/v1/responses, as OpenAI has it."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    stop: str | list[str] | None = None
    stream_options: ResponsesStreamOptions | None = None
    user: str | None = None


class ContentBlock(msgspec.Struct, frozen=True):
    """A part of a message of /v1/messages: text, a call of a tool, or what came of one."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: str | list[Part] | None = None


class AnthropicMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[ContentBlock]


class AnthropicMetadata(msgspec.Struct, frozen=True):
    user_id: str | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """/v1/messages/count_tokens, as Anthropic has it."""

    messages: list[AnthropicMessage]
    model: str | None = None
    system: str | list[Part] | None = None


class MessagesRequest(Shared, kw_only=True):
    """/v1/messages, as Anthropic has it."""

    messages: list[AnthropicMessage]
    max_tokens: int
    system: str | list[Part] | None = None
    stop_sequences: list[str] | None = None
    metadata: AnthropicMetadata | None = None


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


REFUSED: Mapping[type, Mapping[str, Unsupported]] = {
    ChatRequest: unsupported.CHAT,
    CompletionRequest: unsupported.COMPLETIONS,
    ResponsesRequest: unsupported.RESPONSES,
    MessagesRequest: unsupported.MESSAGES,
    CountTokensRequest: unsupported.COUNT_TOKENS,
    TokenizeRequest: unsupported.TOKENIZE,
}


def with_refused(kind: type[T]) -> type[T]:
    """The struct with the fields that are refused for it, which stay as they were sent until they are looked at."""
    fields = [(name, msgspec.Raw, msgspec.Raw(b"null")) for name in REFUSED.get(kind, {})]
    made: type[T] = msgspec.defstruct(kind.__name__, fields, bases=(kind,), kw_only=True)  # type: ignore[assignment]
    return made


_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(with_refused(kind)) for kind in (*REFUSED, DetokenizeRequest)
}


def decoded(body: bytes | bytearray, kind: type[T]) -> T:
    """The body as a request of this kind; `BadRequest` names the field that is wrong, or that cannot be honoured."""
    check_encoding(body)
    request: T = parsed(body, _decoders.get(kind) or msgspec.json.Decoder(kind))
    for name, about in REFUSED.get(kind, {}).items():
        if not unused(name, request):
            refuse(name, getattr(request, name), about)
    return request


def unused(name: str, request: object) -> bool:
    """Whether the field is a list of tools of which none is to be chosen."""
    choice: msgspec.Raw | None = getattr(request, unsupported.LISTS.get(name, ""), None)
    if choice is None or memoryview(choice).nbytes > MAX_DEFAULT:
        return False
    return parsed(bytes(choice), _any) in unsupported.NO_CHOICE


def check_encoding(body: bytes | bytearray) -> None:
    """Raise `BadRequest` unless all of the body is UTF-8, also in fields that no decoder looks at."""
    if body.isascii():
        return
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {shortened(str(error))}") from error


def parsed(body: bytes | bytearray, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise complaint(error, decoder.type, root="the body") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if not body or body.isspace():
            raise BadRequest("the body is empty; send JSON") from error
        if HALF.search(body, 0, HALF_WITHIN):
            raise BadRequest("the body is not valid JSON: a string holds half of a surrogate pair") from error
        raise BadRequest(f"the body is not valid JSON: {shortened(str(error))}") from error


def refuse(name: str, sent: msgspec.Raw, about: Unsupported) -> None:
    """Raise `BadRequest` for a value that cannot be honoured."""
    if about.harmless is unsupported.anything:
        return
    given = parsed(bytes(sent), _any) if memoryview(sent).nbytes <= MAX_DEFAULT else ...
    if given is not None and not about.harmless(given):
        raise BadRequest(f"{name} cannot be honoured: {about.reason}", param=name, code="unsupported_parameter")


_any: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
