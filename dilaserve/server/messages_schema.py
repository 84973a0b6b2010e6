"""What /v1/messages writes, as structs: see `answer_schema`."""

from typing import Literal

from msgspec import UNSET, UnsetType

from dilaserve.server.answer_schema import Costed, Out


class AnthropicErrorBody(Out):
    type: str
    message: str
    param: str | None
    code: str | None


class AnthropicError(Out):
    """An error in Anthropic's shape, with the field at fault beside."""

    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


class AnthropicUsage(Out):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextBlock(Out):
    type: Literal["text"]
    text: str


StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class AnthropicAnswer(Costed, kw_only=True):
    """Anthropic's message object."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicDelta(Out, kw_only=True):
    type: Literal["text_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    stop_reason: StopReason | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(Costed, kw_only=True):
    """One event of a stream; its type says which of the other fields it has. The last one is `message_stop`; an error
    within the stream is an `AnthropicError` instead.
    """

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: AnthropicAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: TextBlock | UnsetType = UNSET
    delta: AnthropicDelta | UnsetType = UNSET
    usage: AnthropicUsage | UnsetType = UNSET


class TokenCount(Out):
    input_tokens: int
