"""Checks values that callers send against types: what is wrong with one becomes a sentence that names its field.

Knows nothing of what the fields mean. HTTP bodies and arguments of the Python API go through the same functions.
"""

import re
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from dilaserve.errors import BadRequest, quoted, shortened
from dilaserve.setting_types import literals

T = TypeVar("T")
NAMES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "array": "a list",
    "object": "an object",
    "null": "null (None)",
}  # of msgspec's types, in words
GOT = NAMES | {"bool": "a boolean", "float": "a float"}


def converted(value: object, kind: type[T], name: str = "") -> T:
    """The value as this type; `name` is what errors call it. Nothing is parsed from text. Raises `BadRequest`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise complaint(error, kind, name) from error
    except RecursionError as error:
        raise BadRequest(f"{name or 'the value'} is nested too deeply", param=name or None) from error


def whole(text: str, name: str) -> str:
    """The text; raises `BadRequest` for one with half of a surrogate pair, which has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} holds half of a surrogate pair; send whole characters", param=name) from error
    return text


def plain(value: T) -> T:
    """A string of a class of its own, such as the member of an enum, as a string; others as they are."""
    return str.__str__(value) if isinstance(value, str) and type(value) is not str else value  # type: ignore[return-value]


def complaint(error: msgspec.ValidationError, kind: Any, name: str = "", root: str = "the value") -> BadRequest:
    """The sentence about a value that is not of its type; `param` is its path, `root` the name of the whole."""
    text, _, path = str(error).partition(" - at ")
    missing = re.search(r"missing required field `(\w+)`", text)
    place = re.search(r"`\$([^`]*)`", path)
    parts = [f"{name}{place[1] if place else ''}".removeprefix("."), missing[1] if missing else ""]
    param = shortened(".".join(filter(None, parts)))
    if path.startswith("`key`"):
        return BadRequest(f"{param or root} must have strings as keys", param=param or None)
    return BadRequest(sentence(text, param, kind, root), param=param or None)


def sentence(text: str, param: str, kind: Any, root: str) -> str:
    """What msgspec says of a field, in plain words."""
    what = param or root
    if found := re.fullmatch(r"Expected `(.+)`, got `(.+)`", text):
        wanted = [NAMES.get(one, one) for one in found[1].split(" | ") if one != "null"]
        return f"{what} must be {' or '.join(wanted)}, not {GOT.get(found[2], shortened(found[2]))}"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        return f"{what} has no field {quoted(found[1])}; correct its name or leave it out"
    if "missing required field" in text:
        return f"{what} is missing"
    if text == "Number out of range":
        return f"{what} is a number out of range"
    if found := re.fullmatch(r"Invalid enum value '?(.*?)'?", text, re.DOTALL):
        words = choices(kind, param)
        return f"{what} must be one of {', '.join(words)}, not {quoted(found[1])}" if words else f"{what}: {text}"
    return f"{param}: {shortened(text)}" if param else shortened(text)


def choices(kind: Any, path: str) -> list[str]:
    """What the field at a path of names chooses from; nothing where it is no choice."""
    hint = kind
    for name in path.split("."):
        owner = next((one for one in (hint, *get_args(hint)) if hasattr(one, "__struct_fields__")), None)
        fields = {field.encode_name: field.name for field in msgspec.structs.fields(owner)} if owner else {}
        if name not in fields:
            return []
        hint = get_type_hints(owner)[fields[name]]
    return literals(hint)
