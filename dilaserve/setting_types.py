"""What values the type of a setting allows, in words. Knows no setting itself."""

from typing import Any, Literal, get_args, get_origin

from msgspec import Meta


def choice(hint: Any) -> str:
    """What there is to choose from, in words; nothing where a type is no choice."""
    words = literals(hint)
    if words[:1] == ["number"]:
        span = limits(hint)
        return f"a number from {span.ge:g} to {span.le:g}, or {' or '.join(words[1:])}"
    return f"one of {', '.join(words)}" if words else ""


def limits(hint: Any) -> Any:
    """Between what a choice's numbers lie."""
    if get_args(hint)[:1] == (float,) and isinstance(found := get_args(hint)[1], Meta):
        return found
    return next(filter(None, map(limits, get_args(hint))), None)


def literals(hint: Any) -> list[str]:
    """The values among which a setting of this type chooses, if it does; a number may be one of them."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    choices = [choice for part in get_args(hint) for choice in literals(part)]
    return ["number", *choices] if choices and "number" not in choices and takes_numbers(hint) else choices


def takes_numbers(hint: Any) -> bool:
    """Whether a fraction may be a value of this type."""
    return hint is float or any(takes_numbers(part) for part in get_args(hint))
