"""Anthropic's /v1/messages: a request as a chat, and errors in Anthropic's shape."""

from collections.abc import Iterator
from typing import Any

from dilaserve.engine.prompts import Function, Message, Part, ToolCall
from dilaserve.errors import BadRequest, DilaserveError, quoted
from dilaserve.server.dialect import Said, Translated, translated
from dilaserve.server.schema import AnthropicMessage, ContentBlock, CountTokensRequest, MessagesRequest, Shared

Json = dict[str, Any]
MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
NAMES = {"stop": "stop_sequences", "prompt": "messages", "user": "metadata.user_id"}
BLOCKS = ("text", "tool_use", "tool_result")
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def as_chat(request: MessagesRequest) -> Translated:
    """The same request as a chat. Raises `BadRequest` for content that is not text."""
    user = request.metadata.user_id if request.metadata else None
    stops = request.stop_sequences
    return translated(request, said(request), NAMES, max_tokens=request.max_tokens, stop=stops, user=user)


def counted(request: CountTokensRequest) -> Translated:
    """The conversation whose tokens are counted, as a chat."""
    return translated(Shared(model=request.model), said(request), NAMES)


def said(request: MessagesRequest | CountTokensRequest) -> list[Said]:
    opening = [Said(Message("system", system_parts(request.system)), "system")] if request.system else []
    return opening + [
        Said(message, f"messages[{i}]")
        for i, one in enumerate(request.messages)
        for message in messages(one, f"messages[{i}]")
    ]


def system_parts(system: str | list[Part]) -> list[str | Part]:
    """A blank line stands between the blocks of a system prompt, which are texts of their own."""
    if isinstance(system, str):
        return [system]
    parts: list[str | Part] = []
    for one in system:
        parts += ["\n\n", one] if parts else [one]
    return parts


def messages(one: AnthropicMessage, place: str) -> Iterator[Message]:
    """The results of tools, then what else the message says, calls of tools included."""
    if isinstance(one.content, str):
        yield Message(one.role, one.content)
        return
    blocks = list(enumerate(one.content))
    for i, block in blocks:
        if block.type == "tool_result":
            yield Message("tool", text_parts(block.content), tool_call_id=block.tool_use_id)
        elif block.type not in BLOCKS:
            raise not_text(block, f"{place}.content[{i}]")
    texts: list[str | Part] = [Part("text", block.text) for _, block in blocks if block.type == "text"]
    calls = [call(block, f"{place}.content[{i}]") for i, block in blocks if block.type == "tool_use"]
    if texts or calls or not blocks:
        yield Message(one.role, texts, tool_calls=calls or None)


def text_parts(content: str | list[Part] | None) -> str | list[str | Part]:
    return [*content] if isinstance(content, list) else content or ""


def call(block: ContentBlock, place: str) -> ToolCall:
    if block.name is None:
        raise BadRequest(f"{place}.name is missing", param=f"{place}.name")
    return ToolCall(block.id, Function(block.name, block.input))


def not_text(block: ContentBlock, place: str) -> BadRequest:
    return BadRequest(
        f"a content block of type {quoted(block.type)} is not text; send {', '.join(BLOCKS)}",
        param=place,
        code="unsupported_parameter",
    )


def failure(error: DilaserveError, request_id: str = "") -> Json:
    """An error in Anthropic's shape, which has no field for the parameter; ours has it beside."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    about = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return {"type": "error", "error": about, "request_id": request_id}
