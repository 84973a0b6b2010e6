"""Sums, chains of sums with every step written out, and word problems in GSM8K's format."""

import random

from dilaserve.profile.problems.problem import Problem

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea", "Ben", "Mia", "Jon", "Zoe", "Ida", "Leo", "Kim", "Amy", "Ron", "Una")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "toys", "nuts", "keys")
GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "gives away", "breaks")
LINKS, LINK_ODDS = ("then", "so", "and"), (0.88, 0.08, 0.04)  # wording that carries no meaning, as in real language
MARKS, MARK_ODDS = ("now", "left"), (0.08, 0.04)  # in place of the things' name


def upto(rng: random.Random, least: int, most: int, difficulty: float) -> int:
    """A number between least and most, or near least while difficulty is low."""
    return rng.randint(least, max(least, round(least + (most - least) * difficulty)))


def addition(rng: random.Random, difficulty: float) -> Problem:
    """A number of up to three digits, and one of up to two added or subtracted; results are not negative."""
    a, b = (rng.randint(0, 10 ** upto(rng, 1, most, difficulty) - 1) for most in (3, 2))
    if rng.random() < 0.5:
        return Problem("add", f"What is {a}+{b}?", str(a + b))
    a, b = max(a, b), min(a, b)
    return Problem("add", f"What is {a}-{b}?", str(a - b))


def chain(rng: random.Random, difficulty: float) -> Problem:
    """Three to ten additions and subtractions of a digit; the value stays between 0 and 99 and is written each time.

    The words between the steps are free: nothing in the prompt tells which, and the check ignores them.
    """
    value = rng.randint(1, 99)
    operations, lines = [f"Start with {value}:"], []
    for _ in range(upto(rng, 3, 10, difficulty)):
        operation, value = next_operation(rng, value)
        operations.append(operation)
        lines.append(f"{operation}={value}")
    worded = [f"{line} {rng.choices(LINKS, LINK_ODDS)[0]}" for line in lines[:-1]]
    return Problem("chain", " ".join(operations), " ".join([*worded, lines[-1]]))


def next_operation(rng: random.Random, value: int) -> tuple[str, int]:
    digit = rng.randint(2, 9)
    choices = [(f"+{digit}", value + digit), (f"-{digit}", value - digit)]
    return rng.choice([(text, result) for text, result in choices if 0 <= result <= 99])


def word_problem(rng: random.Random, difficulty: float) -> Problem:
    """Somebody has things and gains or loses some, two to four times; the working, then `#### answer`."""
    name, thing, value = rng.choice(NAMES), rng.choice(THINGS), rng.randint(10, 60)
    sentences = [f"{name} has {value} {thing}"]
    working: list[str] = []
    for _ in range(upto(rng, 2, 4, difficulty)):
        amount = rng.randint(2, 9)
        gains = value + amount <= 99 and (amount > value or rng.random() < 0.5)
        if not gains and amount > value:
            amount = rng.randint(1, value) if value else 0
        sentences.append(f"{rng.choice(GAINS if gains else LOSSES)} {amount}")
        start, value = "" if working else str(value), value + amount if gains else value - amount
        mark = rng.choices((*MARKS, thing), (*MARK_ODDS, 1 - sum(MARK_ODDS)))[0]
        working.append(f"{start}{'+' if gains else '-'}{amount}={value} {mark}")
    question = f"{', '.join(sentences)}. How many {thing} now?"
    return Problem("word", question, "\n".join([*working, f"#### {value}"]))
