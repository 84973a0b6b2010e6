"""What goes out, as structs: the shapes that /openapi.json shows.

Answers are written as plain objects, without these; a test holds real ones beside them.
"""

from typing import Literal

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


# what all answers share


class Cost(Out):
    """What the answer has cost: steps and refreshes over all choices; seconds queued, served and until the deadline;
    the points of accuracy that lowered thresholds are expected to cost; the tokens that the client had before.
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
    resumed_tokens: int


class PromptTokens(Out):
    cached_tokens: int


class Canvas(Out):
    """The open block after a step; dilaserve.engine.canvas says what the fields are."""

    step: int
    kind: Literal["refresh", "reuse", "commit"]
    refresh: bool
    seconds: float
    block: int
    start: int
    tokens: list[str | None]
    masked: list[bool]
    confidences: list[float | None]
    threshold: float | None


class CanvasStep(Out):
    canvas: Canvas


class UsageSoFar(Out):
    """What a stream has used so far: all its prompts and choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens | UnsetType = UNSET


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


class Headed(Out, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class HeadedCosted(Headed, kw_only=True):
    dilaserve: Cost | UnsetType = UNSET
    warnings: list[str] | UnsetType = UNSET


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
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(HeadedCosted, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    usage: Usage


class Delta(Out, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Out, kw_only=True):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChatLogprobs | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(HeadedCosted, kw_only=True):
    """One event of a stream; the last one, or all, may count what was used."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    usage: UsageSoFar | UnsetType = UNSET


class ChatCanvas(Headed, kw_only=True):
    """The event of a step, where `stream_options.include_canvas` asks for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    dilaserve: CanvasStep
    usage: UsageSoFar | UnsetType = UNSET


class CompletionLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLikelihood(Out, kw_only=True):
    """The estimate for a prompt; the `standard_error` of its total is 0 where that is exact, null after one round.

    `groups` and `rounds` stand in pseudo, `samples` in monte-carlo.
    """

    kind: Literal["pseudo", "monte-carlo"]
    log_likelihood: float
    standard_error: float | None
    groups: int | UnsetType = UNSET
    rounds: int | UnsetType = UNSET
    samples: int | UnsetType = UNSET
    start: int
    seed: int


class CompletionChoice(Out, kw_only=True):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | UnsetType | None = UNSET
    likelihood: PromptLikelihood | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextCompletion(HeadedCosted, kw_only=True):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class TextChunk(HeadedCosted, kw_only=True):
    """One event of a stream; the last one, or all, may count what was used."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageSoFar | UnsetType = UNSET


class TextCanvas(Headed, kw_only=True):
    """The event of a step, where `stream_options.include_canvas` asks for it."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    dilaserve: CanvasStep
    usage: UsageSoFar | UnsetType = UNSET


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


class Quote(Out):
    """What would become of a request now. `met` is null without a deadline and where it is not tested; what is expected
    is null where it is not known.
    """

    admitted: bool
    met: bool | None
    deadline_ms: float | None
    slack_ms: float | None
    confidence_threshold: float | None
    never_feasible: bool
    retry_after_ms: float | None
    wait_ms: float | None
    finish_ms: float | None
    running: int
    waiting: int


class Tokens(Out):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Out):
    prompt: str
