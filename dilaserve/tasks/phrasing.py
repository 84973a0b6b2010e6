"""Problems in other words: each task has several templates, with something polite before or behind them.

Knows the tasks' own words (`PATTERNS`) and gives another prompt for the same problem. The answer stays.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from dilaserve.tasks.forms import drawn
from dilaserve.tasks.problem import Problem

PATTERNS = {
    "plus": r"What is (?P<a>\d+)\+(?P<b>\d+)\?",
    "minus": r"What is (?P<a>\d+)-(?P<b>\d+)\?",
    "chain": r"Start with (?P<start>\d+): (?P<all>.*)",
    "word": r"(?P<name>\w+) has (?P<start>\d+) (?P<thing>\w+), (?P<all>.*)\. How many \w+ now\?",
    "sort": r"Sort: (?P<all>.*)",
    "reverse": r"Reverse: (?P<word>.*)",
    "capitals": r"Capitals: (?P<word>.*)",
    "json": r"JSON: (?P<text>.*)",
    "compare": r"Is (?P<a>\d+) larger than (?P<b>\d+)\?",
    "contains": r"Is (?P<word>\w+) in the list (?P<all>.*)\?",
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "plus": (
        *(
            "What is {a}+{b}?",
            "What is {a} + {b}?",
            "What's {a}+{b}?",
            "What does {a}+{b} give?",
            "How much is {a}+{b}?",
        ),
        *("{a}+{b}", "{a} + {b}", "{a}+{b}=", "{a} + {b} =", "{a}+{b}=?", "{a} + {b} = ?", "{a}+{b}?", "{a} plus {b}"),
        *("Calculate {a}+{b}.", "Compute {a} + {b}.", "Add {a} and {b}.", "Add {b} to {a}.", "Sum: {a} {b}"),
        *("What is {a} plus {b}?", "How much is {a} plus {b}?", "What is the sum of {a} and {b}?"),
        *(
            "The sum of {a} and {b}",
            "Tell me {a}+{b}.",
            "Can you add {a} and {b}?",
            "Solve {a} + {b}.",
            "Work out {a}+{b}.",
        ),
    ),
    "minus": (
        *(
            "What is {a}-{b}?",
            "What is {a} - {b}?",
            "What's {a}-{b}?",
            "What does {a}-{b} give?",
            "How much is {a}-{b}?",
        ),
        *("{a}-{b}", "{a} - {b}", "{a}-{b}=", "{a} - {b} =", "{a}-{b}=?", "{a} - {b} = ?", "{a}-{b}?", "{a} minus {b}"),
        *(
            "Calculate {a}-{b}.",
            "Compute {a} - {b}.",
            "Subtract {b} from {a}.",
            "Take {b} from {a}.",
            "Take {b} away from {a}.",
        ),
        *("What is {a} minus {b}?", "How much is {a} minus {b}?", "{a} less {b}", "{a} take away {b}"),
        *("Tell me {a}-{b}.", "Can you subtract {b} from {a}?", "Solve {a} - {b}.", "Work out {a}-{b}."),
    ),
    "chain": (
        *("Start with {start}: {all}", "Start at {start}: {all}", "Begin with {start}: {all}", "From {start}: {all}"),
        *("Start with {start}, then {commas}.", "Take {start}: {all}", "Start with {start} and do {commas}."),
        *(
            "Start with {start}: {commas}",
            "Start with {start} {all}",
            "Chain: {start} {all}",
            "Steps from {start}: {all}",
        ),
        *(
            "{start} {all}",
            "{start}{tight}",
            "What is {start}{tight}?",
            "What is {start} {all}?",
            "Begin at {start}: {commas}",
        ),
        *(
            "Start with {start}: {spoken}",
            "Start with {start}, then {spoken}.",
            "Take {start}, {spoken}.",
            "{start} {spoken}",
        ),
        *(
            "Work out {start} {all} step by step.",
            "Go from {start}: {all}",
            "Calculate {start} {all}.",
            "Start: {start}. {all}",
        ),
    ),
    "word": (
        *(
            "{name} has {start} {thing}, {commas}. How many {thing} now?",
            "{name} has {start} {thing}, {ands}. How many now?",
        ),
        *(
            "{name} has {start} {thing}, {ands}. How many {thing} are left?",
            "{name} has {start} {thing}, {ands}. How many are left?",
        ),
        "{name} has {start} {thing}, {ands}. How many {thing} does {name} have now?",
        "{name} had {start} {thing}. {name} {ands}. How many {thing} are there now?",
        "{name} starts with {start} {thing}, {thens}. How many {thing} now?",
        "How many {thing} does {name} have now? {name} had {start} {thing}, {commas}.",
        "{name} has {start} {thing}. Then {name} {ands}. How many {thing} does {name} have?",
        "{name} has {start} {thing}. {name} {sentences}. How many {thing} now?",
        "{name} has {start} {thing} and {thens}. How many {thing} does {name} have left?",
        "If {name} has {start} {thing}, {ands}, how many {thing} are left?",
    ),
    "sort": (
        *("Sort: {all}", "Sort {all}", "Sort: {commas}", "Sort {commas}", "Sort these numbers: {all}", "Order: {all}"),
        *(
            "Sort these numbers: {commas}",
            "Sort the numbers {commas}.",
            "Sort the numbers {ands}.",
            "Sort this list: {all}",
        ),
        *(
            "Put {all} in order.",
            "Put these in order: {all}",
            "Put {commas} in order.",
            "Put the numbers {ands} in order.",
        ),
        *(
            "Order these numbers: {commas}",
            "Arrange {commas} in order.",
            "Arrange: {all}",
            "Sort [{commas}]",
            "sort({all})",
        ),
        *(
            "Sort from small to large: {all}",
            "Sort in ascending order: {commas}",
            "Can you sort {all}?",
            "Sorted: {all}",
        ),
        *("Can you sort these numbers: {all}?", "Sort the list {all}.", "Which order: {all}?", "Sort numbers: {all}"),
    ),
    "reverse": (
        *(
            "Reverse: {word}",
            "Reverse {word}",
            "Reverse {word}.",
            "Reverse the word {word}.",
            'Reverse "{word}"',
            "Reverse '{word}'",
        ),
        *("Reverse this word: {word}", "Reverse this: {word}", "Spell {word} backwards.", "Write {word} backwards."),
        *(
            "What is {word} backwards?",
            "What is {word} reversed?",
            "What is the reverse of {word}?",
            "{word} backwards",
        ),
        *(
            "{word} reversed",
            "Turn {word} around.",
            "Say {word} backwards.",
            "Can you reverse {word}?",
            "Backwards: {word}",
        ),
        *(
            "Can you spell {word} backwards?",
            "How do you spell {word} backwards?",
            "Read {word} from the end.",
            "Reversed: {word}",
        ),
    ),
    "capitals": (
        *(
            "Capitals: {word}",
            "Capitals {word}",
            "{word} in capitals",
            "Write {word} in capitals.",
            "Put {word} in capitals.",
        ),
        *(
            "Uppercase: {word}",
            "Uppercase {word}",
            "{word} in upper case",
            "Write {word} in upper case.",
            "Upper case: {word}",
        ),
        *(
            "Make {word} upper case.",
            "In capitals: {word}",
            'Write "{word}" in capitals.',
            "Turn {word} into capitals.",
        ),
        *(
            "Can you write {word} in capitals?",
            "What is {word} in capitals?",
            "Capital letters: {word}",
            "Use capitals: {word}",
        ),
    ),
    "json": (
        *(
            "JSON: {text}",
            "As JSON: {text}",
            "Turn this into JSON: {text}",
            "Write as JSON: {text}",
            "Make JSON: {text}",
        ),
        *(
            "{text} As JSON.",
            "{text} Write that as JSON.",
            "Convert to JSON: {text}",
            "Extract JSON: {text}",
            "To JSON: {text}",
        ),
        *(
            "Write this as JSON: {text}",
            "Make this JSON: {text}",
            "Give me JSON: {text}",
            "JSON for: {text}",
            "json: {text}",
        ),
        *("Extract the fields as JSON: {text}", "Can you turn this into JSON? {text}", "{text} JSON?", "JSON {text}"),
    ),
    "compare": (
        *("Is {a} larger than {b}?", "Is {a} bigger than {b}?", "Is {a} greater than {b}?", "Is {a} more than {b}?"),
        *(
            "Is {a} > {b}?",
            "{a} > {b}?",
            "{a}>{b}?",
            "{a} > {b}",
            "Is {b} smaller than {a}?",
            "Is {b} less than {a}?",
            "{b} < {a}?",
        ),
        *("Is it true that {a} is larger than {b}?", "Yes or no: is {a} larger than {b}?", "Larger than {b}: is {a}?"),
        *(
            "Does {a} exceed {b}?",
            "Is the number {a} larger than {b}?",
            "Tell me if {a} is larger than {b}.",
            "Is {b} < {a}?",
        ),
    ),
    "contains": (
        *("Is {word} in the list {all}?", "Is {word} in: {all}?", "Is {word} in {all}?", "Is {word} one of {commas}?"),
        *(
            "Is the word {word} in this list: {commas}?",
            "Is the word {word} in the list {all}?",
            "Is {word} among {commas}?",
        ),
        *("Does the list {commas} contain {word}?", "Does {all} contain {word}?", "List: {all}. Is {word} in it?"),
        *(
            "Yes or no: is {word} in the list {commas}?",
            "Can you find {word} in {commas}?",
            "Is {word} in the list {commas}?",
        ),
        *(
            "Is {word} in this list? {all}",
            "Here is a list: {commas}. Is {word} in the list?",
            "Is {word} in [ {commas} ]?",
        ),
    ),
}
OPENINGS = (
    *("Please ", "please ", "Hi! ", "Hi, ", "Hello! ", "Hello, ", "Hey, ", "Hey! ", "Question: ", "Quick question: "),
    *(
        "Now ",
        "And ",
        "OK, ",
        "Ok. ",
        "Next: ",
        "Then ",
        "Great. ",
        "Thanks! ",
        "Can you help me? ",
        "I have a question. ",
    ),
    *(
        "Answer this: ",
        "Here is one: ",
        "Another one: ",
        "Good. ",
        "Good morning! ",
        "So ",
        "Well, ",
        "Also: ",
        "Task: ",
    ),
)
CLOSINGS = (
    *(
        " please",
        ", please",
        " Please.",
        " Thanks!",
        " Thanks.",
        " Thank you!",
        " thanks",
        " Answer briefly.",
        "?",
        "!",
    ),
    *(" Just the answer.", " Only the answer, please.", "\n", " "),
)
CASES = ("as it is", "small", "bare", "small and bare")
CASE_ODDS = (0.6, 0.15, 0.15, 0.1)
SIGNS = {"+": "plus", "-": "minus"}


class Wording(NamedTuple):
    """How a problem is put: a template, what stands before and behind it, and how its first and last letters look."""

    template: str
    opening: str
    closing: str
    case: str

    def put(self, slots: dict[str, str]) -> str:
        text = self.opening + cased(self.template, self.case, bool(self.opening)) + self.closing
        return re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], text)


def cased(template: str, case: str, inside: bool) -> str:
    if "bare" in case:
        template = template.rstrip(".?!=: ")
    small = "small" in case or (inside and case == "bare")
    return template[:1].lower() + template[1:] if small else template


def wording(rng: random.Random, templates: Sequence[str]) -> tuple[str, Wording]:
    """Some wording, with its form."""
    opening = rng.choice(OPENINGS) if rng.random() < 0.3 else ""
    closing = rng.choice(CLOSINGS) if rng.random() < 0.2 else ""
    found = Wording(rng.choice(templates), opening, closing, rng.choices(CASES, CASE_ODDS)[0])
    return repr(tuple(found)), found


def rephrased(problem: Problem, rng: random.Random, held_out: bool = False) -> Problem:
    """The same problem in other words, those held out or those for training."""
    name, slots = recognised(problem.prompt)
    found = drawn(lambda rng: wording(rng, TEMPLATES[name]), rng, held_out)
    return problem._replace(prompt=found.put(slots), origin=problem.origin or problem.prompt)


def recognised(prompt: str) -> tuple[str, dict[str, str]]:
    """Which pattern a prompt in a task's own words follows, and what fills its slots."""
    for name, pattern in PATTERNS.items():
        if match := re.fullmatch(pattern, prompt):
            return name, filled(match.groupdict())
    raise ValueError(f"no task asks in these words: {prompt!r}")


def filled(slots: dict[str, str]) -> dict[str, str]:
    """The slots, and where there is a list its other ways of being written."""
    if "all" not in slots:
        return slots
    listed = slots["all"]
    parts = listed.split(", ") if ", " in listed else listed.split()
    ands = parts if len(parts) == 1 else [", ".join(parts[:-1]), parts[-1]]
    spoken = ", ".join(f"{SIGNS[part[0]]} {part[1:]}" for part in parts if part[0] in SIGNS)
    more = {"commas": ", ".join(parts), "ands": " and ".join(ands), "thens": ", then ".join(parts), "spoken": spoken}
    name = slots.get("name", "")
    return slots | more | {"tight": "".join(parts), "sentences": f". {name} ".join(parts)}
