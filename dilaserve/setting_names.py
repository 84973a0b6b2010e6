"""Names of settings as people write them: in tables, with dashes, with a slip. Knows no setting itself."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from dilaserve.errors import ConfigError

NEAR = 0.75  # difflib's likeness, 0 to 1, from which a name counts as a slip of another
SERVICE_LINKS = re.compile(r"(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_|$)")  # that Kubernetes makes of a Service


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that was probably meant."""
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), known, 1, NEAR)), None)


def slips(environ: Collection[str], prefix: str, known: Collection[str]) -> list[str]:
    """Sentences about variables with our prefix that are no settings, and near one."""
    found = []
    for variable in sorted(environ):
        name = variable.removeprefix(prefix)
        if name == variable or name.lower() in known or SERVICE_LINKS.match(name):
            continue
        if near := nearest(name, known):
            found.append(f"{variable} is no setting and is ignored; did you mean {prefix}{near.upper()}?")
    return found


def flattened(tree: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    """Leaf names and values of a TOML document, which may write dashes and tables.

    `groups` names each known setting's table. Raises `ConfigError` for a name that stands in another table or twice.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        leaves = value.items() if isinstance(value, dict) else [(key, value)]
        if isinstance(value, dict) and key not in groups.values():
            raise ConfigError(
                f"unknown table [{key}]; tables are {', '.join(dict.fromkeys(groups.values()))}", param=key
            )
        for written, one in leaves:
            name = written.replace("-", "_")
            if isinstance(value, dict) and groups.get(name, key) != key:
                raise ConfigError(f"{written} belongs into the table [{groups[name]}], not [{key}]", param=name)
            if name in found:
                raise ConfigError(f"{written} is given twice in the file; keep one", param=name)
            found[name] = one
    return found
