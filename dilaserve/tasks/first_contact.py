"""What a newcomer types, made by a program: a fixed share of each kind, all of forms that are never trained on."""

import random
from typing import NamedTuple

from dilaserve.tasks.catalogue import TASKS
from dilaserve.tasks.conversation import Conversation, Conversations
from dilaserve.tasks.smalltalk import ANSWERS, small_talk

KINDS = {  # shares
    "small talk": 0.15,
    "refusals": 0.1,
    "other words": 0.35,
    "system prompt": 0.2,
    "second turn": 0.1,
    "third turn": 0.05,
    "plain text": 0.05,
}


class Contact(NamedTuple):
    kind: str
    conversation: Conversation


def first_contact(rng: random.Random, count: int) -> list[Contact]:
    """About `count` conversations."""
    made = Conversations(rng, dict.fromkeys(TASKS, 1.0), held_out=True)
    return [Contact(kind, one(made, kind)) for kind, share in KINDS.items() for _ in range(round(share * count))]


def one(made: Conversations, kind: str) -> Conversation:
    rng = made.rng
    if kind == "small talk":
        asked = small_talk(rng.choice([talk for talk in ANSWERS if talk != "refusal"]), rng, held_out=True)
        return made.chat(asked, system=False, turns=1)
    if kind == "refusals":
        return made.chat(small_talk("refusal", rng, held_out=True), system=False, turns=1)
    if kind == "plain text":
        return made.plain(made.some_problem(0.0))
    if kind == "other words":
        return made.chat(made.some_problem(0.0), system=False, turns=1)
    turns = {"system prompt": 1, "second turn": 2, "third turn": 3}[kind]
    return made.chat(made.some_problem(), system=kind == "system prompt" or rng.random() < 0.5, turns=turns)
