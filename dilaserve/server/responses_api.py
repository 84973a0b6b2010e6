"""OpenAI's /v1/responses: a request as a chat, and what the answer repeats of it."""

from typing import Any

from dilaserve.engine.prompts import Function, Message, ToolCall
from dilaserve.errors import BadRequest, quoted
from dilaserve.server.dialect import Said, Translated, translated
from dilaserve.server.schema import InputItem, ResponsesRequest

Json = dict[str, Any]
NAMES = {"max_tokens": "max_output_tokens", "prompt": "input", "messages": "input", "user": "user"}
CALLS, OUTPUTS = ("function_call", "custom_tool_call"), ("function_call_output", "custom_tool_call_output")
ITEMS = ("message", *CALLS, *OUTPUTS)
LOGPROBS = "message.output_text.logprobs"
REASONING = "reasoning.encrypted_content"  # of reasoning items, which no answer has; LiteLLM always asks for it
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # of metadata, as OpenAI limits them


def as_chat(request: ResponsesRequest) -> Translated:
    """The same request as a chat. Raises `BadRequest` for items that are not text, and for long metadata."""
    check_metadata(request.metadata or {})
    said = [Said(Message("system", request.instructions), "instructions")] if request.instructions else []
    items = [InputItem(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    if not items:
        raise BadRequest("input must not be empty", param="input")
    said += [Said(message(item, f"input[{i}]"), f"input[{i}]") for i, item in enumerate(items)]
    if isinstance(request.input, str):
        said[-1] = said[-1]._replace(source="input")
    return translated(
        request,
        said,
        NAMES,
        max_tokens=request.max_output_tokens,
        stop=request.stop,
        user=request.user,
        logprobs=wants_logprobs(request),
        top_logprobs=request.top_logprobs,
    )


def wants_logprobs(request: ResponsesRequest) -> bool:
    """Raises `BadRequest` for an `include` that cannot be honoured."""
    for i, name in enumerate(request.include or ()):
        if name not in (LOGPROBS, REASONING):
            raise BadRequest(
                f"include knows {LOGPROBS!r} alone here, not {quoted(name)}; leave it out",
                param=f"include[{i}]",
                code="unsupported_parameter",
            )
    return LOGPROBS in (request.include or ()) or bool(request.top_logprobs)


def message(item: InputItem, place: str) -> Message:
    """The message that says the same as the item."""
    if item.type == "message":
        if item.role is None:
            raise BadRequest(f"{place}.role is missing", param=f"{place}.role")
        return Message(item.role, item.content)
    if item.type in CALLS:
        if item.name is None:
            raise BadRequest(f"{place}.name is missing", param=f"{place}.name")
        called = Function(item.name, item.arguments, item.input)
        return Message("assistant", None, tool_calls=[ToolCall(item.call_id, called)])
    if item.type in OUTPUTS:
        return Message("tool", item.output or "", tool_call_id=item.call_id)
    raise BadRequest(
        f"an input item of type {quoted(item.type)} is not text; send messages, function calls and their outputs",
        param=f"{place}.type",
        code="unsupported_parameter",
    )


def check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > MAX_PAIRS or any(len(k) > MAX_KEY or len(v) > MAX_VALUE for k, v in metadata.items()):
        raise BadRequest(
            f"metadata holds at most {MAX_PAIRS} pairs of {MAX_KEY} and {MAX_VALUE} characters; send less",
            param="metadata",
        )


def repeated(request: ResponsesRequest) -> Json:
    """The fields of a response that say how it was asked for."""
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature or 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
