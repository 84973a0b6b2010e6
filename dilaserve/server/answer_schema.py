"""What goes out, as structs: the shapes that /openapi.json shows.

Answers are written as plain objects, without these; a test holds real ones beside them.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class Out(msgspec.Struct, forbid_unknown_fields=True):
    """Whatever goes out has no fields but these."""


# errors


class ErrorBody(Out):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Out):
    """An error in OpenAI's shape; `param` names the field at fault."""

    error: ErrorBody


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


# what all answers share


class Cost(Out):
    """What the answer has cost: steps and refreshes over all choices; seconds queued, served and until the deadline;
    the points of accuracy that lowered thresholds are expected to cost.
    """

    steps: int
    refreshes: int
    queued: float
    served: float
    mean_confidence: float | None
    deadline_met: bool | None
    deadline: float | None
    min_threshold: float | None
    mean_threshold: float | None
    expected_accuracy_drop: float | None


class PromptTokens(Out):
    cached_tokens: int


class Usage(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Logprob(Out):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Logprob):
    """The chosen token and the most probable ones, in the step that unmasked the position."""

    top_logprobs: list[Logprob]


class Costed(Out, kw_only=True):
    dilaserve: Cost | UnsetType = UNSET
    warnings: list[str] | UnsetType = UNSET


class Headed(Costed, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


# chat and completions


class ChatLogprobs(Out):
    content: list[TokenLogprob]


class ChatMessage(Out):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Out):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None


class ChatCompletion(Headed, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Delta(Out, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Out, kw_only=True):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChatLogprobs | UnsetType | None = UNSET


class ChatChunk(Headed, kw_only=True):
    """One event of a stream, which ends with `data: [DONE]`; an error within it is an `Error` instead."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | UnsetType = UNSET


class CompletionLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Out, kw_only=True):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | UnsetType | None = UNSET


class TextCompletion(Headed, kw_only=True):
    """An answer, or one event of a stream, which ends with `data: [DONE]`; the last one may count what was used."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


# responses


class InputTokens(Out):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(Out):
    reasoning_tokens: int


class ResponseUsage(Out):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class OutputText(Out):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Out):
    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ResponseError(Out):
    code: str
    message: str


class Response(Costed, kw_only=True):
    """OpenAI's response object; the fields below `usage` repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | UnsetType | None = UNSET
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, dict[str, str]]
    tool_choice: str
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class ResponseEvent(Out, kw_only=True):
    """One event of a stream; its type says which of the other fields it has. The last one is `response.completed`,
    `response.incomplete` or `error`.
    """

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    item: OutputMessage | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
    error: ErrorBody | UnsetType = UNSET


# messages


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


# around it


class Status(Out):
    status: str


class Version(Out):
    version: str


class Model(Out):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class Models(Out):
    object: Literal["list"]
    data: list[Model]


class PlanChange(Out):
    at: float
    before: str
    plan: str
    groups: list[list[int]]
    reason: str
    seconds: float
    pause_seconds: float | None


class PlanState(Out):
    plan: str
    groups: list[list[int]]
    wanted: str
    auto: bool
    no_planner: str | None
    devices: list[str]
    degrees: list[int]
    history: list[PlanChange]


class Tokens(Out):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Out):
    prompt: str
