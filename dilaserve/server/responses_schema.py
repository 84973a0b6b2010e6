"""What /v1/responses writes, as structs: see `answer_schema`."""

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from dilaserve.server.answer_schema import Costed, ErrorBody, Out, TokenLogprob


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
