"""Whole conversations with the answer that is expected of the model: problems in all wordings and small talk, with or
without a system prompt, in the first turn or a later one, as a chat or as plain text.

What is drawn is for training, or held out: then wording, system prompt and small talk are of held-out forms, and the
problem is held out too.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from dilaserve.tasks.catalogue import TASKS, check, is_held_out, same_text
from dilaserve.tasks.everyday import everyday
from dilaserve.tasks.forms import drawn
from dilaserve.tasks.phrasing import rephrased
from dilaserve.tasks.problem import Problem
from dilaserve.tasks.smalltalk import ANSWERS, small_talk
from dilaserve.tasks.systems import system_prompt

TALK = {"greeting": 3, "feeling": 1, "thanks": 1, "farewell": 1, "identity": 2, "ability": 3, "refusal": 14}
SYSTEM_SHARE = 0.35  # of the chats that begin with a system prompt
TURNS, TURN_ODDS = (1, 2, 3), (0.75, 0.17, 0.08)
BEYOND_SHARE = 0.2  # of the problems that lie beyond the ranges of the tasks
OWN_WORDS_SHARE = 0.45  # of the problems for training that are asked in the task's own words
PLAIN_SHARE = 0.08  # of the conversations that are plain text
QUESTION_MARKS = ("Q: {}\nA:", "Q: {} A:", "Question: {}\nAnswer:", "Q: {}\n\nA:", "{}\nA:", "{}\n", "{}")
Difficulty = Callable[[], float]


class Message(NamedTuple):
    role: str
    content: str


class Conversation(NamedTuple):
    """What the model sees, `messages` or else plain `text`, and the last problem in it."""

    messages: tuple[Message, ...]
    text: str
    problem: Problem

    @property
    def answer(self) -> str:
        """As it is written behind the prompt: plain text goes on after a space."""
        gap = " " if self.text and not self.text[-1].isspace() else ""
        return gap + self.problem.answer


def sensible(problem: Problem, answer: str) -> bool:
    """Whether the answer is right by the task's rule, or in small talk what is expected."""
    return check(problem, answer) if problem.task in TASKS else same_text(answer, problem.answer)


class Conversations:
    """Draws conversations from `rng`. `mix` weighs the tasks, `difficulty` is asked for each problem."""

    def __init__(
        self, rng: random.Random, mix: dict[str, float], held_out: bool = False, difficulty: Difficulty = lambda: 1.0
    ) -> None:
        self.rng, self.mix, self.held_out, self.difficulty = rng, mix, held_out, difficulty

    def worked(self, task: str) -> Problem:
        """A problem of the task, for training mostly in its own words."""
        while True:
            beyond = everyday(task, self.rng) if self.rng.random() < BEYOND_SHARE else None
            problem = beyond or TASKS[task].draw(self.rng, self.difficulty())
            if is_held_out(problem) == self.held_out:
                break
        tiny = problem.task == "chain" and problem.prompt.count(" ") < 4  # in other words it is a sum
        if tiny or (not self.held_out and self.rng.random() < OWN_WORDS_SHARE):
            return problem
        return rephrased(problem, self.rng, self.held_out)

    def talked(self) -> Problem:
        return small_talk(self.rng.choices(list(TALK), list(TALK.values()))[0], self.rng, self.held_out)

    def some_problem(self, talk: float = 0.2) -> Problem:
        """Small talk in a share `talk`, else a task."""
        if self.rng.random() < talk:
            return self.talked()
        return self.worked(self.rng.choices(list(self.mix), list(self.mix.values()))[0])

    def system(self) -> Message:
        return Message("system", drawn(system_prompt, self.rng, self.held_out))

    def turn(self) -> tuple[Message, Message]:
        """An earlier turn; what was answered there may have been anything."""
        problem = self.some_problem(0.3)
        answer = problem.answer if self.rng.random() < 0.9 else self.rng.choice(list(ANSWERS.values()))
        return Message("user", problem.prompt), Message("assistant", answer)

    def chat(self, problem: Problem, system: bool, turns: int) -> Conversation:
        before = [self.system()] if system else []
        for _ in range(turns - 1):
            before += self.turn()
        return Conversation((*before, Message("user", problem.prompt)), "", problem)

    def plain(self, problem: Problem) -> Conversation:
        """Plain text, now and then with questions and answers before the last question."""
        marks = self.rng.choice(QUESTION_MARKS)
        text = ""
        for _ in range(self.rng.choice((0, 0, 0, 1, 2)) if "A" in marks else 0):
            before = self.some_problem(0.0)
            text += f"{marks.format(before.prompt)} {before.answer}\n\n"
        return Conversation((), text + marks.format(problem.prompt), problem)

    def __next__(self) -> Conversation:
        rng = self.rng
        if rng.random() < PLAIN_SHARE:
            return self.plain(self.some_problem(0.1))
        return self.chat(self.some_problem(), rng.random() < SYSTEM_SHARE, rng.choices(TURNS, TURN_ODDS)[0])

    def __iter__(self) -> "Conversations":
        return self
