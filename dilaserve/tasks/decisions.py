"""Questions that are answered by yes or no: which of two numbers is larger, and whether a word is in a list."""

import random

from dilaserve.tasks.arithmetic import upto
from dilaserve.tasks.problem import Problem
from dilaserve.tasks.strings import word


def verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def comparison(rng: random.Random, difficulty: float) -> Problem:
    """Whether one number of up to three digits is larger than another."""
    a, b = (rng.randint(0, 10 ** upto(rng, 1, 3, difficulty) - 1) for _ in range(2))
    if rng.random() < 0.2:  # close ones too
        b = max(0, a + rng.randint(-9, 9))
    return Problem("compare", f"Is {a} larger than {b}?", verdict(a > b))


def membership(rng: random.Random, difficulty: float) -> Problem:
    """Whether a word is one of two to five. Of the words that are not, the hard ones differ from one by a letter."""
    words = [word(rng, 3, upto(rng, 3, 7, difficulty)) for _ in range(upto(rng, 2, 5, difficulty))]
    other = lookalike(rng, rng.choice(words)) if rng.random() < 0.5 * difficulty else word(rng, 3, len(words[0]))
    asked = rng.choice(words) if rng.random() < 0.5 else other
    return Problem("contains", f"Is {asked} in the list {' '.join(words)}?", verdict(asked in words))


def lookalike(rng: random.Random, text: str) -> str:
    """This word with another letter in it."""
    at, letter = rng.randrange(len(text)), rng.choice("abcdefghijklmnopqrstuvwxyz")
    return text[:at] + letter + text[at + 1 :]
