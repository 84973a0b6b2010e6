"""Hashes of the beginnings of a canvas, under which requests find each other's K/V: of prompts, and of answers as they
become final, which are a part of the next turn's prompt.
"""

import hashlib
from typing import Any

import numpy as np

from dilaserve.types import PAGE, Decoding

Tokens = np.ndarray[Any, np.dtype[np.int32]]


class PrefixHasher:
    """Hashes one canvas, from its start on. Two canvases share a page's hash if they share all tokens up to its end."""

    def __init__(self, salt: str) -> None:
        self.state = hashlib.blake2b(salt.encode(), digest_size=16)
        self.position = 0  # tokens taken in
        self.rest = b""  # those behind the last whole page

    def extend(self, tokens: Tokens) -> tuple[int, ...]:
        """Take in the next tokens [tokens]; returns one hash for each page that is whole now."""
        data, size = self.rest + tokens.astype(np.int32).tobytes(), PAGE * 4
        whole, found = len(data) // size * size, []
        for start in range(0, whole, size):
            self.state.update(data[start : start + size])
            found.append(int.from_bytes(self.state.copy().digest()))
        self.rest, self.position = data[whole:], self.position + len(tokens)
        return tuple(found)


def prefix_hasher(decoding: Decoding) -> PrefixHasher | None:
    """None where K/V depend on what comes after.

    They do not if attention is causal, or by blocks that begin at position 0 and of which whole ones fill a page.
    """
    traits, block = decoding.traits, decoding.block_length
    aligned = traits.attention == "block" and traits.grid == "start" and PAGE % block == 0
    if not (aligned or traits.attention == "causal"):
        return None
    return PrefixHasher(f"{traits.attention} {block if aligned else 1}")
