"""What a prompt may be (a text, token ids, or a conversation) and the one check of it, for HTTP and for Python.

A conversation becomes what a chat template takes: roles that it knows, and one text a message, tool calls included.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from dilaserve.errors import BadRequest, quoted
from dilaserve.validation import converted, plain, whole

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
KINDS = "a string, a list of token ids (whole numbers), or a list of messages (with role and content)"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # where a part has its text


class Part(msgspec.Struct, frozen=True, gc=False):
    type: str
    text: str | None = None
    refusal: str | None = None


class Function(msgspec.Struct, frozen=True):
    """A call of a function, or of a custom tool, whose `input` is text."""

    name: str
    arguments: Any = None
    input: str | None = None


class ToolCall(msgspec.Struct, frozen=True):
    id: str | None = None
    function: Function | None = None
    custom: Function | None = None


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[str | Part] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None


class Roles(Protocol):
    """A chat template, as far as it matters here."""

    def knows_role(self, role: str) -> bool: ...


def listed(prompt: object) -> str | list[Any]:
    """The prompt as a text, or as a list of what it holds. Raises `BadRequest` for what is neither."""
    if isinstance(prompt, str):
        return whole(prompt, "prompt")
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise BadRequest(f"prompt must be {KINDS}, not {type(prompt).__name__}", param="prompt")
    return list(prompt)


def is_conversation(items: Sequence[object]) -> bool:
    """Whether a list is meant as messages; `token_ids` says what is wrong with any other."""
    return bool(items) and all(isinstance(item, Mapping | Message) for item in items)


def token_ids(ids: object, vocab_size: int, name: str = "prompt") -> list[int]:
    """A list of ids that the model knows. Raises `BadRequest`."""
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray | memoryview):
        raise BadRequest(f"{name} must be a list of token ids, not {type(ids).__name__}", param=name)
    found = list(ids)
    kinds = set(map(type, found))
    if not kinds <= {int}:
        odd = next(type(one).__name__ for one in found if type(one) is not int)
        what = KINDS if name == "prompt" else "a list of token ids, which are whole numbers"
        raise BadRequest(f"{name} must be {what}; this list holds {odd}", param=name)
    if not 0 <= min(found, default=0) <= max(found, default=0) < vocab_size:
        raise BadRequest(f"{name} holds an id outside the whole numbers from 0 to {vocab_size - 1}", param=name)
    return found


def conversation(said: Sequence[object], template: Roles) -> list[dict[str, str]]:
    """Messages with a role and a text each, from mappings or `Message`s. Raises `BadRequest`.

    Calls of tools in the history become text of the assistant, and results of tools text of the user, as templates and
    models that know no tools would otherwise lose them. A developer is a system where the template knows no developer.
    """
    if not said:
        raise BadRequest("messages must not be empty", param="messages")
    messages = [one if isinstance(one, Message) else message(one, i) for i, one in enumerate(said)]
    roles = ROLES | ({"developer": "developer"} if template.knows_role("developer") else {})
    called: dict[str, str] = {}  # names of functions by the id of their call
    found = []
    for i, one in enumerate(messages):
        text = whole(spoken(one, i, called), f"messages[{i}].content")
        found.append({"role": role(one, i, roles), "content": text})
        called |= {
            plain(call.id): known.name for call in one.tool_calls or () if call.id and (known := function(call, i))
        }
    return found


def message(given: object, i: int) -> Message:
    return converted(given, Message, f"messages[{i}]")


def role(message: Message, i: int, roles: Mapping[str, str]) -> str:
    name = plain(message.role)
    if name not in roles:
        raise BadRequest(f"the role {quoted(name)} is not one of {', '.join(roles)}", param=f"messages[{i}].role")
    return roles[name]


def spoken(message: Message, i: int, called: Mapping[str, str]) -> str:
    """All that a message says, as text."""
    said = content(message, i)
    if message.role in ("tool", "function"):
        return f"Result of {called.get(plain(message.tool_call_id or '')) or message.name or 'the tool'}: {said}"
    calls = [function(call, i) for call in message.tool_calls or ()]
    if message.function_call:
        calls.append(message.function_call)
    return "\n".join([*filter(None, [said]), *map(call_text, calls)])


def content(message: Message, i: int) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise BadRequest("a message needs content", param=f"messages[{i}].content")
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "".join(part if isinstance(part, str) else part_text(part, i) for part in message.content)


def part_text(part: Part, i: int) -> str:
    kind = plain(part.type)
    text = getattr(part, TEXTS[kind]) if kind in TEXTS else None
    if not isinstance(text, str):
        kinds = ", ".join(TEXTS)
        raise BadRequest(
            f"a content part of type {quoted(part.type)} is not text; send {kinds}", param=f"messages[{i}].content"
        )
    return text


def function(call: ToolCall, i: int) -> Function:
    if (found := call.function or call.custom) is None:
        raise BadRequest("a tool call needs a function", param=f"messages[{i}].tool_calls")
    return found


def call_text(call: Function) -> str:
    given = call.arguments if call.input is None else call.input
    return f"Call {call.name}({given if isinstance(given, str) else as_json(given)})"


def as_json(given: object) -> str:
    try:
        return "" if given is None else msgspec.json.encode(given).decode()
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise BadRequest("the arguments of a function call must be a string or JSON", param="messages") from error
