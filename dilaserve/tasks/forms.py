"""Forms are texts or patterns of texts that a program puts together. One in eight, by a hash, is never trained on."""

import random
import zlib
from collections.abc import Callable
from typing import TypeVar

HELD_OUT_SHARE = 8  # one form in so many is held out
T = TypeVar("T")


def is_held_out_form(form: str) -> bool:
    return zlib.crc32(b"form " + form.encode()) % HELD_OUT_SHARE == 0


def drawn(draw: Callable[[random.Random], tuple[str, T]], rng: random.Random, held_out: bool) -> T:
    """What `draw` returns beside a form, from the first of its forms that lies in this part."""
    while True:
        form, found = draw(rng)
        if is_held_out_form(form) == held_out:
            return found
