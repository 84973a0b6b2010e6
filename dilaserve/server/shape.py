"""What a JSON body holds, counted before it is decoded, so that decoding never takes long."""

from typing import NamedTuple

from dilaserve.errors import BadRequest

Buffer = bytes | bytearray
NUMBERS = 2**18  # numbers, and whatever else commas separate: as many as token ids that are taken at once
CONTAINERS = 2**14  # lists and objects, also nested ones; each costs as much as ten numbers
STRINGS = 2**15  # strings, the names of fields too
FRACTIONS = 512  # numbers with a point or an exponent: the slow ones take 20 microseconds each
ESCAPES = 2**20  # backslashes


class Shape(NamedTuple):
    """Upper bounds on what the JSON parser will make of a body; of a body that is JSON they are exact."""

    numbers: int
    containers: int
    strings: int
    fractions: int
    escapes: int


LIMITS = Shape(NUMBERS, CONTAINERS, STRINGS, FRACTIONS, ESCAPES)
WORDS = Shape("values", "lists and objects", "strings", "numbers with a fraction or an exponent", "escaped characters")  # type: ignore[arg-type]


def check(body: Buffer) -> None:
    """Raise `BadRequest` for a body that holds more of anything than `LIMITS`.

    It only counts bytes, without a loop over them: some milliseconds for four MiB. Strings are taken out first,
    because text may hold any number of brackets and commas.
    """
    escapes = body.count(b"\\")
    refuse_above(Shape(0, 0, 0, 0, escapes))
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if escapes else body
    strings = plain.count(b'"') // 2
    refuse_above(Shape(0, 0, strings, 0, escapes))
    outside = b"".join(plain.split(b'"')[::2])
    refuse_above(
        Shape(
            numbers=outside.count(b","),
            containers=outside.count(b"[") + outside.count(b"{"),
            strings=strings,
            fractions=fractions(outside),
            escapes=escapes,
        )
    )


def fractions(outside: Buffer) -> int:
    """Numbers with a point or an exponent; the e of true and false is not one."""
    exponents = outside.count(b"e") + outside.count(b"E") - outside.count(b"true") - outside.count(b"false")
    return outside.count(b".") + exponents


def refuse_above(found: Shape) -> None:
    for count, most, word in zip(found, LIMITS, WORDS, strict=True):
        if count > most:
            raise BadRequest(f"the body holds {count} {word}; at most {most} are read", code="body_too_complex")
