"""What a JSON body holds, counted before it is decoded, so that decoding never takes long."""

from typing import NamedTuple

from dilaserve.errors import BadRequest

Buffer = bytes | bytearray
NUMBERS = 2**18  # numbers, and whatever else commas separate: as many as token ids that are taken at once
CONTAINERS = 2**14  # lists and objects, also nested ones; each costs as much as ten numbers
STRINGS = 2**16  # quotes around strings, the names of fields too
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
WORDS = Shape("values", "lists and objects", "quotes", "numbers with a fraction or an exponent", "escaped characters")  # type: ignore[arg-type]


class Counter:
    """Counts piece by piece, without a loop over bytes: some milliseconds for one MiB.

    Strings are left out of what is counted in them, because text may hold any number of brackets and commas.
    """

    def __init__(self) -> None:
        self.found = Shape(0, 0, 0, 0, 0)
        self.inside = 0  # 1 where a piece begins within a string
        self.rest = b""  # a backslash at the end of a piece, which belongs to the next byte

    def add(self, piece: Buffer) -> None:
        """Raises `BadRequest` as soon as there is more of anything than `LIMITS`."""
        piece = self.rest + piece
        self.rest = b"\\" if (len(piece) - len(piece.rstrip(b"\\"))) % 2 else b""
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in piece else piece
        parts = plain.split(b'"', self.strings_left())
        outside = b"".join(parts[self.inside :: 2])
        self.inside ^= (len(parts) - 1) % 2
        more = Shape(
            numbers=outside.count(b","),
            containers=outside.count(b"[") + outside.count(b"{"),
            strings=len(parts) - 1,
            fractions=fractions(outside),
            escapes=piece.count(b"\\"),
        )
        self.found = Shape(*map(sum, zip(self.found, more, strict=True)))
        refuse_above(self.found)

    def strings_left(self) -> int:
        """Quotes after which there are certainly too many."""
        return LIMITS.strings - self.found.strings + 1


def check(body: Buffer) -> None:
    """Raise `BadRequest` for a body that holds more of anything than `LIMITS`."""
    Counter().add(body)


def fractions(outside: Buffer) -> int:
    """Numbers with a point or an exponent; the e of true and false is not one, unless a piece ends within the word."""
    exponents = outside.count(b"e") + outside.count(b"E") - outside.count(b"true") - outside.count(b"false")
    return outside.count(b".") + exponents


def refuse_above(found: Shape) -> None:
    for count, most, word in zip(found, LIMITS, WORDS, strict=True):
        if count > most:
            raise BadRequest(f"the body holds more than {most} {word}; send less at a time", code="body_too_complex")
