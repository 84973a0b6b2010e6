"""Problems with answers that a rule can check: what the bundled model is trained on, and what accuracy is measured on.

Knows nothing of models. A problem belongs to the held-out part or to the training part by a hash of its prompt, so the
two never meet, whatever the seeds.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dilaserve.profile.problems.arithmetic import addition, chain, word_problem
from dilaserve.profile.problems.problem import Problem, last_number, operations, squeezed
from dilaserve.profile.problems.strings import extraction, reversal, sorting

HELD_OUT_SHARE = 50  # one problem in so many is never trained on
DRY = 50_000  # draws in a row that bring no new problem, after which there are no more


class Task(NamedTuple):
    """A generator of problems, at a difficulty from 0 (short ones only) to 1 (the full range), and the check."""

    draw: Callable[[random.Random, float], Problem]
    same: Callable[[str, str], bool]


def same_text(answer: str, expected: str) -> bool:
    """Equal but for white space at the ends and its amount inside."""
    return squeezed(answer) == squeezed(expected)


def same_steps(answer: str, expected: str) -> bool:
    """Every operation with its result, in order; the words between them are free."""
    return operations(answer) == operations(expected)


def same_result(answer: str, expected: str) -> bool:
    """The number behind the last `####` counts, as GSM8K is scored."""
    return last_number(answer) is not None and last_number(answer) == last_number(expected)


TASKS: dict[str, Task] = {
    "add": Task(addition, same_text),
    "chain": Task(chain, same_steps),
    "word": Task(word_problem, same_result),
    "sort": Task(sorting, same_text),
    "reverse": Task(reversal, same_text),
    "json": Task(extraction, same_text),
}


def check(problem: Problem, answer: str) -> bool:
    """Whether the answer is right, by the task's rule."""
    return TASKS[problem.task].same(answer, problem.answer)


def is_held_out(problem: Problem) -> bool:
    return zlib.crc32(problem.prompt.encode()) % HELD_OUT_SHARE == 0


def held_out(task: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` different held-out problems over the full range of the task, or as many as there are."""
    rng = random.Random(f"{task} {seed}")
    found: dict[str, Problem] = {}
    dry = 0
    while len(found) < count and dry < DRY:
        problem = TASKS[task].draw(rng, 1.0)
        dry += 1
        if is_held_out(problem) and problem.prompt not in found:
            found[problem.prompt] = problem
            dry = 0
    return list(found.values())


def training(task: str, rng: random.Random, difficulty: Callable[[], float]) -> Iterator[Problem]:
    """An endless stream of problems that are not held out; `difficulty` is asked for each."""
    while True:
        problem = TASKS[task].draw(rng, difficulty())
        if not is_held_out(problem):
            yield problem
