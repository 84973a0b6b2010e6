"""Problems as people type them, beyond the tasks' own ranges: real words and names, very short chains, capitals."""

import functools
import itertools
import json
import random
import re

from dilaserve.tasks.arithmetic import GAINS, LOSSES, NAMES, THINGS, chain_of, story
from dilaserve.tasks.decisions import lookalike, verdict
from dilaserve.tasks.phrasing import TEMPLATES
from dilaserve.tasks.problem import Problem
from dilaserve.tasks.smalltalk import ABILITIES
from dilaserve.tasks.strings import word
from dilaserve.tasks.systems import ROLES, RULES

WORDS = (
    *(
        "hello",
        "world",
        "apple",
        "banana",
        "cherry",
        "orange",
        "lemon",
        "house",
        "garden",
        "water",
        "river",
        "mountain",
    ),
    *("python", "server", "model", "diffusion", "computer", "keyboard", "table", "chair", "window", "school", "street"),
    *("love", "happy", "light", "night", "morning", "summer", "winter", "music", "letter", "paper", "bread", "cheese"),
    *(
        "racecar",
        "level",
        "abc",
        "abcd",
        "test",
        "word",
        "stressed",
        "drawer",
        "cat",
        "dog",
        "horse",
        "elephant",
        "tiger",
    ),
    *("cool", "queen", "king", "wizard", "jazz", "box", "fox", "lazy", "quick", "brown", "over", "jump"),
)
PEOPLE = (
    *("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Lucas", "Maria", "Nina", "Oscar"),
    *("Peter", "Sarah", "Thomas", "Victor", "Anna", "John", "Jane", "Mary", "Paul", "Lisa", "Mark", "Laura", "James"),
)
CITIES = (
    *(
        "Paris",
        "London",
        "Berlin",
        "Rome",
        "Madrid",
        "Vienna",
        "Oslo",
        "Lisbon",
        "Prague",
        "Boston",
        "Chicago",
        "Tokyo",
    ),
    *(
        "Zurich",
        "Munich",
        "Dublin",
        "Athens",
        "Milan",
        "Warsaw",
        "Geneva",
        "Seattle",
        "Denver",
        "Austin",
        "Delhi",
        "Lima",
    ),
)
GOODS = (
    "marbles",
    "dogs",
    "dollars",
    "balls",
    "oranges",
    "stickers",
    "pencils",
    "candies",
    "cakes",
    "flowers",
    "bottles",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def everyday(task: str, rng: random.Random) -> Problem | None:
    """A problem of the task beyond its own range, if there is such a thing."""
    return rng.choice(RANGES[task])(rng) if task in RANGES else None


def any_word(rng: random.Random) -> str:
    """A real word, a word that stands in many prompts, a made-up one, or letters."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(WORDS)
    if kind < 0.55:
        return rng.choice(common())
    if kind < 0.75:
        return word(rng, 2, 10)
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 9)))


@functools.cache
def common() -> list[str]:
    """The words of templates and answers. They are single tokens, so that their letters must be learned one by one."""
    texts = (*itertools.chain(*TEMPLATES.values()), *ROLES, *RULES, *ABILITIES, *NAMES, *THINGS, *GAINS, *LOSSES)
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", text))}
    return sorted(word for word in words if 1 < len(word) < 12)


def short_chain(rng: random.Random) -> Problem:
    return chain_of(rng, rng.randint(1, 2))


def other_story(rng: random.Random) -> Problem:
    name = rng.choice(PEOPLE) if rng.random() < 0.5 else word(rng, 3, 6).title()
    thing = rng.choice(GOODS) if rng.random() < 0.7 else word(rng, 3, 6) + "s"
    return story(rng, name, thing, rng.randint(1, 4))


def backwards(rng: random.Random) -> Problem:
    text = any_word(rng)
    text = text.title() if rng.random() < 0.15 else text
    return Problem("reverse", f"Reverse: {text}", text[::-1])


def capitals(rng: random.Random) -> Problem:
    text = any_word(rng)
    text = f"{text} {any_word(rng)}" if rng.random() < 0.15 else text
    return Problem("reverse", f"Capitals: {text}", text.upper())


def person(rng: random.Random) -> Problem:
    name = rng.choice(PEOPLE + NAMES) if rng.random() < 0.6 else any_word(rng).title()
    city = rng.choice(CITIES) if rng.random() < 0.5 else any_word(rng).title()
    age = rng.randint(1, 99)
    verb = rng.choice(("lives in", "lives in", "lives in", "comes from", "is from"))
    years = rng.choice(("", "", " years old"))
    answer = json.dumps({"name": name, "age": age, "city": city}, separators=(",", ":"))
    return Problem("json", f"JSON: {name} is {age}{years} and {verb} {city}.", answer)


def numbers(rng: random.Random) -> Problem:
    found = [rng.randint(0, 10 ** rng.randint(1, 3) - 1) for _ in range(rng.randint(2, 5))]
    return Problem("sort", f"Sort: {' '.join(map(str, found))}", " ".join(map(str, sorted(found))))


def listed(rng: random.Random) -> Problem:
    words = [any_word(rng) for _ in range(rng.randint(1, 6))]
    other = lookalike(rng, rng.choice(words)) if rng.random() < 0.5 else any_word(rng)
    asked = rng.choice(words) if rng.random() < 0.5 else other
    return Problem("contains", f"Is {asked} in the list {' '.join(words)}?", verdict(asked in words))


RANGES = {
    "chain": (short_chain,),
    "word": (other_story,),
    "reverse": (backwards, capitals),
    "json": (person,),
    "sort": (numbers,),
    "contains": (listed,),
}
