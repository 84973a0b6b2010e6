"""What the other APIs' requests are translated to: a chat, and where each of its messages came from, for errors."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dilaserve.engine.prompts import Message
from dilaserve.errors import BadRequest
from dilaserve.server.schema import ChatRequest, Shared

SHARED = Shared.__struct_fields__
PLACE = re.compile(r"messages\[(\d+)\]")


class Said(NamedTuple):
    """A message, and the field that it came from, such as `input[2]`."""

    message: Message
    source: str


class Translated(NamedTuple):
    """A request as a chat. `names`: how the client has called the chat's fields."""

    chat: ChatRequest
    sources: list[str]
    names: Mapping[str, str]

    @contextlib.contextmanager
    def spelled(self) -> Iterator[None]:
        """Errors name the messages as the client has sent them."""
        try:
            yield
        except BadRequest as error:
            param = error.param or ""
            if place := PLACE.match(param):
                named = self.sources[int(place[1])] + param[place.end() :]
            else:
                named = self.names.get(param, param)
            raise BadRequest(self.reworded(error.message, param), param=named or None, code=error.code) from error

    def reworded(self, message: str, param: str) -> str:
        for name, theirs in self.names.items():
            if "_" in name or name == param != "messages":
                message = re.sub(rf"(?<!\.)\b{name}\b", theirs, message)
        return message


def translated(request: Shared, said: list[Said], names: Mapping[str, str], **fields: Any) -> Translated:
    """The chat of these messages, with what all endpoints share, and `fields` of a chat that the endpoint knows."""
    shared = {name: getattr(request, name) for name in SHARED}
    chat = ChatRequest(messages=[one.message for one in said], **shared, **fields)
    return Translated(chat, [one.source for one in said], names)
