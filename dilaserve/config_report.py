"""Every setting with its value and where that comes from, as a table and as a file for --config."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dilaserve.config import Config, Setting, settings

SECRET = {"api_key", "admin_key"}
MASK = "********"
WIDTHS = (24, 24)  # characters of a name and of a value, after which longer ones push the rest aside


class Entry(NamedTuple):
    """A setting, its value and its source: default, flag, or where else it was given."""

    setting: Setting
    value: Any
    source: str

    @property
    def shown(self) -> Any:
        return MASK if self.setting.name in SECRET and self.value is not None else self.value


def entries(config: Config, sources: Mapping[str, str]) -> list[Entry]:
    """All settings in the tree's order; `sources` names those that are given."""
    return [
        Entry(one, getattr(getattr(config, one.group), one.name), sources.get(one.name, "default"))
        for one in settings().values()
    ]


def as_table(found: Sequence[Entry]) -> Iterator[str]:
    """A line each: name, value, source."""
    for one in found:
        value = "-" if one.shown is None else json.dumps(one.shown, ensure_ascii=False)
        yield f"{one.setting.name:<{WIDTHS[0]}} {value:<{WIDTHS[1]}} {one.source}"


def as_toml(found: Sequence[Entry]) -> Iterator[str]:
    """A TOML document with a table for each group. Defaults without a value and keys are comments."""
    group = ""
    for one in found:
        if one.setting.group != group:
            yield f"{chr(10) if group else ''}[{(group := one.setting.group)}]  # {one.setting.heading.splitlines()[0]}"
        hidden = one.value is None or one.setting.name in SECRET
        value = "" if one.value is None else json.dumps(one.shown, ensure_ascii=False)
        line = f"{one.setting.name.replace('_', '-')} = {value}".rstrip()
        yield f"{'# ' if hidden else ''}{line}  # {one.setting.description}; source: {one.source}"
