"""Sums, chains of sums with every step written out, and word problems in GSM8K's format."""

import random

from dilaserve.tasks.problem import Problem

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea", "Ben", "Mia", "Jon", "Zoe", "Ida", "Leo", "Kim", "Amy", "Ron", "Una")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "toys", "nuts", "keys")
GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "gives away", "breaks")
LINK = " then"  # optional between two steps of a chain; in a word problem the things' name is optional
LARGE = 7  # amounts from here on have the lower odds below
LINK_ODDS, UNIT_ODDS, LARGE_ODDS = 0.84, 0.87, 0.66  # that a link or a unit is there, or either beside a large amount
NEGATIVE = 0.1  # share of the differences whose result is negative


def upto(rng: random.Random, least: int, most: int, difficulty: float) -> int:
    """A number between least and most, or near least while difficulty is low."""
    return rng.randint(least, max(least, round(least + (most - least) * difficulty)))


def worded(rng: random.Random, amount: int, odds: float) -> bool:
    """Whether the optional word beside this amount is written. It carries no meaning, as in real language.

    What comes behind it moves by a token, so a model is not sure of it before the word is decided.
    """
    return rng.random() < (LARGE_ODDS if amount >= LARGE else odds)


def addition(rng: random.Random, difficulty: float) -> Problem:
    """The sum or difference of two numbers of up to three digits."""
    a, b = (rng.randint(0, 10 ** upto(rng, 1, 3, difficulty) - 1) for _ in range(2))
    if rng.random() < 0.5:
        return Problem("add", f"What is {a}+{b}?", str(a + b))
    if (a < b) != (rng.random() < NEGATIVE):
        a, b = b, a
    return Problem("add", f"What is {a}-{b}?", str(a - b))


def chain(rng: random.Random, difficulty: float) -> Problem:
    """Three to ten additions and subtractions of a digit; the value stays between 0 and 99 and is written each time."""
    return chain_of(rng, upto(rng, 3, 10, difficulty))


def chain_of(rng: random.Random, count: int) -> Problem:
    value = rng.randint(1, 99)
    prompt, answer = f"Start with {value}:", ""
    for i in range(count):
        operation, value = next_operation(rng, value)
        prompt += f" {operation}"
        link = LINK if i and worded(rng, int(operation[1:]), LINK_ODDS) else ""
        answer += f"{link} {operation}={value}"
    return Problem("chain", prompt, answer.strip())


def next_operation(rng: random.Random, value: int) -> tuple[str, int]:
    digit = rng.randint(2, 9)
    choices = [(f"+{digit}", value + digit), (f"-{digit}", value - digit)]
    return rng.choice([(text, result) for text, result in choices if 0 <= result <= 99])


def word_problem(rng: random.Random, difficulty: float) -> Problem:
    """Somebody has things and gains or loses some, two to four times; the working, then `#### answer`."""
    return story(rng, rng.choice(NAMES), rng.choice(THINGS), upto(rng, 2, 4, difficulty))


def story(rng: random.Random, name: str, thing: str, count: int) -> Problem:
    value = rng.randint(10, 60)
    told = [f"{name} has {value} {thing}"]
    working: list[str] = []
    for _ in range(count):
        amount = rng.randint(2, 9)
        gains = value + amount <= 99 and (amount > value or rng.random() < 0.5)
        if not gains and amount > value:
            amount = rng.randint(1, value) if value else 0
        told.append(f"{rng.choice(GAINS if gains else LOSSES)} {amount}")
        start, value = "" if working else str(value), value + amount if gains else value - amount
        unit = f" {thing}" if worded(rng, amount, UNIT_ODDS) else ""
        working.append(f"{start}{'+' if gains else '-'}{amount}={value}{unit}")
    question = f"{', '.join(told)}. How many {thing} now?"
    return Problem("word", question, "\n".join([*working, f"#### {value}"]))
