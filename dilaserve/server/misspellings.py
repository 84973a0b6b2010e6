"""Unknown fields that look like known ones, or stand in the wrong place: the warnings that clients get."""

import difflib
from collections.abc import Mapping
from itertools import islice

import msgspec

from dilaserve.errors import quoted
from dilaserve.server.schema import REFUSED, Slo, StreamOptions

MAX_NAMES = 10_000  # colons of a body in which misspelled fields are looked for
MAX_WARNINGS = 8
MAX_UNKNOWN = 8  # unknown names that are compared with known ones, at a millisecond or two each
MAX_NAME = 48  # characters of a name that can be a misspelled one
ALIKE = 0.8  # of difflib's ratio, from which a name is taken for a misspelled one
OTHER_NAMES = {  # of other servers, or other endpoints: what is known here, the last one first
    "deadline": ["slo.deadline_ms"],
    "slo_class": ["slo.class"],
    "stop_sequences": ["stop"],
    "max_output_tokens": ["max_tokens"],
    "max_tokens": ["max_output_tokens"],
    "max_completion_tokens": ["max_tokens", "max_output_tokens"],
    "max_new_tokens": ["max_tokens", "max_output_tokens"],
    "system": ["messages"],
    "instructions": ["messages"],
    "user": ["metadata.user_id"],
}
OWNERS: Mapping[str, type[msgspec.Struct]] = {"slo": Slo, "stream_options": StreamOptions}
_names = msgspec.json.Decoder(dict[str, msgspec.Raw])


def misspelled(body: bytes | bytearray, kind: type[msgspec.Struct]) -> list[str]:
    """A warning for each unknown field of a body, which is valid, that looks like a known one."""
    if body.count(b":") > MAX_NAMES:
        return []
    known = {*(field.encode_name for field in msgspec.structs.fields(kind)), *REFUSED.get(kind, ())}
    targets = places(kind, known) | {plain(name): name for name in known}
    found: list[str] = []
    unknown = (name for name in _names.decode(body) if name not in known and len(name) <= MAX_NAME)
    for name in islice(unknown, MAX_UNKNOWN):
        if len(found) == MAX_WARNINGS:
            break
        if near := difflib.get_close_matches(plain(name), targets, 1, ALIKE):
            found.append(f"the field {quoted(name)} is unknown and was ignored; did you mean {targets[near[0]]!r}?")
    return found


def places(kind: type[msgspec.Struct], known: set[str]) -> dict[str, str]:
    """The right place of fields that belong elsewhere in the body, or have another name here, by their plain name."""
    found: dict[str, str] = {}
    for owner, inner in OWNERS.items():
        if owner in kind.__struct_fields__:
            names = [field.encode_name for field in msgspec.structs.fields(inner)]
            found |= {plain(name): f"{owner}.{name}" for name in names}
    for name, others in OTHER_NAMES.items():
        found |= {plain(name): other for other in others if other in known or other.partition(".")[0] in known}
    return found


def plain(name: str) -> str:
    """The letters by which names are compared: maxTokens is max_tokens."""
    return name.lower().replace("_", "").replace("-", "")
