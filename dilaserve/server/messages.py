"""The conversation as the chat template takes it: roles it knows, and one text a message, tool calls included."""

from collections.abc import Mapping, Sequence

import msgspec

from dilaserve.errors import BadRequest, quoted
from dilaserve.server.schema import Function, Message, Part, ToolCall
from dilaserve.text import Text

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # where a part has its text


def conversation(messages: Sequence[Message], text: Text) -> list[dict[str, str]]:
    """Messages with a role and a text each.

    Calls of tools in the history become text of the assistant, and results of tools text of the user, as templates and
    models that know no tools would otherwise lose them. A developer is a system where the template knows no developer.
    """
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    roles = ROLES | ({"developer": "developer"} if text.knows_role("developer") else {})
    called: dict[str, str] = {}  # names of functions by the id of their call
    found = []
    for i, message in enumerate(messages):
        found.append({"role": role(message, i, roles), "content": spoken(message, i, called)})
        called |= {call.id: told.name for call in message.tool_calls or () if call.id and (told := function(call, i))}
    return found


def role(message: Message, i: int, roles: Mapping[str, str]) -> str:
    if message.role not in roles:
        raise BadRequest(
            f"the role {quoted(message.role)} is not one of {', '.join(roles)}", param=f"messages[{i}].role"
        )
    return roles[message.role]


def spoken(message: Message, i: int, called: Mapping[str, str]) -> str:
    """All that a message says, as text."""
    said = content(message, i)
    if message.role in ("tool", "function"):
        return f"Result of {called.get(message.tool_call_id or '') or message.name or 'the tool'}: {said}"
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
    text = getattr(part, TEXTS[part.type]) if part.type in TEXTS else None
    if not isinstance(text, str):
        kinds = ", ".join(TEXTS)
        raise BadRequest(
            f"a content part of type {quoted(part.type)} is not text; send {kinds}", param=f"messages[{i}].content"
        )
    return text


def function(call: ToolCall, i: int) -> Function:
    if (told := call.function or call.custom) is None:
        raise BadRequest("a tool call needs a function", param=f"messages[{i}].tool_calls")
    return told


def call_text(call: Function) -> str:
    given = call.arguments if call.input is None else call.input
    if not isinstance(given, str):
        given = msgspec.json.encode(given).decode() if given is not None else ""
    return f"Call {call.name}({given})"
