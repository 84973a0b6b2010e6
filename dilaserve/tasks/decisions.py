"""Questions that are answered by yes or no: which of two numbers is larger, and whether a word is in a list."""

import random

from dilaserve.tasks.arithmetic import NAMES, THINGS, upto
from dilaserve.tasks.problem import Problem


def verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def comparison(rng: random.Random, difficulty: float) -> Problem:
    """Whether one number of up to three digits is larger than another."""
    a, b = (rng.randint(0, 10 ** upto(rng, 1, 3, difficulty) - 1) for _ in range(2))
    if rng.random() < 0.2:  # close ones too
        b = max(0, a + rng.randint(-9, 9))
    return Problem("compare", f"Is {a} larger than {b}?", verdict(a > b))


def membership(rng: random.Random, difficulty: float) -> Problem:
    """Whether a word, of those that the tasks use anyway, is one of two to five."""
    kind = rng.choice((NAMES, THINGS, NAMES + THINGS))
    words = rng.sample(kind, upto(rng, 2, 5, difficulty))
    asked = rng.choice(words) if rng.random() < 0.5 else rng.choice([word for word in kind if word not in words])
    return Problem("contains", f"Is {asked} in the list {' '.join(words)}?", verdict(asked in words))


def lookalike(rng: random.Random, text: str) -> str:
    """This word with another letter in it."""
    at, letter = rng.randrange(len(text)), rng.choice("abcdefghijklmnopqrstuvwxyz")
    return text[:at] + letter + text[at + 1 :]
