"""Sorting short lists, reversing and upper-casing words, extracting fields as JSON."""

import json
import random

from dilaserve.profile.problems.arithmetic import upto
from dilaserve.profile.problems.problem import Problem

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def word(rng: random.Random, least: int, most: int) -> str:
    """A pronounceable word that no dictionary holds."""
    length, first = rng.randint(least, most), rng.randint(0, 1)
    return "".join(rng.choice(VOWELS if (i + first) % 2 else CONSONANTS) for i in range(length))


def sorting(rng: random.Random, difficulty: float) -> Problem:
    """Three to five different numbers of two digits, to be put in order."""
    numbers = rng.sample(range(10, 100), upto(rng, 3, 5, difficulty))
    return Problem("sort", f"Sort: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers))))


def reversal(rng: random.Random, difficulty: float) -> Problem:
    """A word of four to ten letters, backwards or in capitals."""
    text = word(rng, 4, upto(rng, 6, 10, difficulty))
    if rng.random() < 0.7:
        return Problem("reverse", f"Reverse: {text}", text[::-1])
    return Problem("reverse", f"Capitals: {text}", text.upper())


def extraction(rng: random.Random, difficulty: float) -> Problem:
    """A sentence about a person, as a JSON object with three or four fields."""
    name, city, age = word(rng, 3, 6).title(), word(rng, 4, 8).title(), rng.randint(18, 99)
    fields: dict[str, str | int] = {"name": name, "age": age, "city": city}
    if rng.random() < 0.5 * difficulty:
        fields["room"] = rng.randint(100, 9999)
        sentence = f"{name} is {age}, lives in {city} and has room {fields['room']}."
    else:
        sentence = f"{name} is {age} and lives in {city}."
    return Problem("json", f"JSON: {sentence}", json.dumps(fields, separators=(",", ":")))
