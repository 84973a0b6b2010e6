"""Hashes of the beginnings of a prompt, under which requests find each other's K/V."""

import hashlib
from typing import Any

import numpy as np

from dilaserve.types import PAGE, Decoding


def prefix_hashes(prompt: np.ndarray[Any, np.dtype[np.int32]], decoding: Decoding) -> tuple[int, ...]:
    """One hash a page of the prompt [tokens], of all tokens up to its end; none where K/V depend on what comes after.

    They do not if attention is causal, or by blocks that begin at position 0 and of which whole ones fill a page.
    """
    traits, block = decoding.traits, decoding.block_length
    aligned = traits.attention == "block" and traits.grid == "start" and PAGE % block == 0
    if not (aligned or traits.attention == "causal"):
        return ()
    state = hashlib.blake2b(f"{traits.attention} {block if aligned else 1}".encode(), digest_size=16)
    found = []
    for page in prompt[: len(prompt) // PAGE * PAGE].reshape(-1, PAGE):
        state.update(page.tobytes())
        found.append(int.from_bytes(state.copy().digest()))
    return tuple(found)
