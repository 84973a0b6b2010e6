"""Endless examples for training, as token ids."""

import functools
import random
from collections.abc import Callable, Iterator
from pydoc_data import topics
from typing import NamedTuple

from dilaserve.tasks.conversation import Conversation, Conversations, Message
from dilaserve.tasks.problem import Problem
from dilaserve.tasks.smalltalk import ANSWERS
from recipe.sizes import BLOCK, MAX_LENGTH
from recipe.vocabulary import EOS, ids, prompt_ids

LONG_SYSTEM_SHARE, LONG_REQUEST_SHARE = 0.03, 0.02  # of the conversations that hold a piece of other prose


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]  # with the end token


def examples(rng: random.Random, mix: dict[str, float], difficulty: Callable[[], float]) -> Iterator[Example]:
    for conversation in Conversations(rng, mix, difficulty=difficulty):
        varied = with_prose(conversation, rng)
        found = Example(prompt_ids(varied), [*ids(varied.answer), EOS])
        if len(found.prompt) + len(found.answer) + BLOCK <= MAX_LENGTH:
            yield found


def with_prose(conversation: Conversation, rng: random.Random) -> Conversation:
    """Now and then with a system prompt that is prose about anything, or with prose instead of a question."""
    luck = rng.random()
    if luck < LONG_REQUEST_SHARE:
        request = Message("user", prose(rng, 60))
        problem = Problem("refusal", request.content, ANSWERS["refusal"])
        return Conversation((*conversation.messages[:-1], request), "", problem)
    if luck < LONG_REQUEST_SHARE + LONG_SYSTEM_SHARE and conversation.messages:
        rest = [message for message in conversation.messages if message.role != "system"]
        return conversation._replace(messages=(Message("system", prose(rng, 120)), *rest))
    return conversation


def prose(rng: random.Random, longest: int) -> str:
    """Up to so many words of Python's own manual."""
    words = manual()
    start = rng.randrange(len(words) - longest)
    return " ".join(words[start : start + rng.randint(3, longest)])


@functools.cache
def manual() -> list[str]:
    return " ".join(topics.topics.values()).split()
