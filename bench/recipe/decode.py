"""Answers of the net in training by threshold decoding, many at once, without a cache; and what they are worth."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dilaserve.tasks import TASKS, held_out
from dilaserve.tasks.conversation import Conversation, Message, sensible
from dilaserve.tasks.first_contact import first_contact
from recipe.net import Net
from recipe.sizes import BLOCK, MAX_LENGTH
from recipe.vocabulary import EOS, MASK, prompt_ids, tokenizer

THRESHOLDS = (0.95, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6)
ROOM = 128  # tokens for an answer
ROWS = 512  # at once


class Answer(NamedTuple):
    text: str
    steps: int


class Score(NamedTuple):
    accuracy: float  # percent
    steps: float


@torch.inference_mode()
def answers(net: Net, conversations: Sequence[Conversation], threshold: float) -> list[Answer]:
    """In order; those of like length run together."""
    prompts = [prompt_ids(conversation) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Answer] = {}
    for first in range(0, len(order), ROWS):
        part = order[first : first + ROWS]
        found |= zip(part, decoded(net, [prompts[i] for i in part], threshold), strict=True)
    return [found[i] for i in range(len(prompts))]


def decoded(net: Net, prompts: list[list[int]], threshold: float) -> list[Answer]:
    device = net.head.device
    start = torch.tensor([len(prompt) for prompt in prompts], device=device)
    length = min(MAX_LENGTH, int(start.max()) + ROOM)
    padded = [prompt + [MASK] * ROOM + [EOS] * (length - len(prompt) - ROOM) for prompt in prompts]
    ids = torch.tensor(padded, device=device)
    at = torch.arange(length, device=device)
    ends = start + ROOM
    block = start.clone()  # where the active block begins
    steps = torch.zeros_like(start)
    rows = torch.arange(len(prompts), device=device)
    while len(rows):
        now, first = ids[rows], block[rows]
        inside = first[:, None] + torch.arange(BLOCK, device=device)
        seen = torch.zeros(len(rows), 1, 1, length, device=device)
        seen.masked_fill_((at >= ends[rows][:, None])[:, None, None], -torch.inf)
        flat = (torch.arange(len(rows), device=device)[:, None] * length + inside).flatten()
        logits = net(now, at.expand_as(now), seen.expand(-1, 1, length, -1), flat).float()
        logits[:, MASK] = -torch.inf
        confidence, token = logits.softmax(-1).view(len(rows), BLOCK, -1).max(-1)
        masked = now.gather(1, inside) == MASK
        confidence = confidence.masked_fill(~masked, -1.0)
        taken = masked & ((confidence >= threshold) | (confidence == confidence.amax(1, keepdim=True)))
        now.scatter_(1, inside, torch.where(taken, token, now.gather(1, inside)))
        ids[rows] = now
        steps[rows] += 1
        open_ = (now == MASK) & (at >= start[rows][:, None])
        ended = (now == EOS) & (at >= start[rows][:, None])
        complete = first_of(ended) < first_of(open_)
        full = (now.gather(1, inside) != MASK).all(1)
        block[rows] = torch.where(full, first + BLOCK, first)
        rows = rows[~complete & (block[rows] < ends[rows])]
    texts = [written(row[begin:].tolist()) for row, begin in zip(ids.cpu(), start.tolist(), strict=True)]
    return [Answer(text, count) for text, count in zip(texts, steps.tolist(), strict=True)]


def first_of(flags: torch.Tensor) -> torch.Tensor:
    """The first column that is set in each row, or one that is past all."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])


def written(ids: list[int]) -> str:
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    text: str = tokenizer().decode(ids, skip_special_tokens=True)
    return text


def scored(net: Net, conversations: Sequence[Conversation], threshold: float) -> Score:
    found = answers(net, conversations, threshold)
    right = [sensible(asked.problem, answer.text) for asked, answer in zip(conversations, found, strict=True)]
    return Score(100 * sum(right) / len(right), sum(answer.steps for answer in found) / len(found))


def table(net: Net, count: int, say: Callable[[str], None]) -> None:
    """Held-out problems by task and threshold; more of the chains and word problems."""
    for task in TASKS:
        problems = held_out(task, count * 4 if task in ("chain", "word") else count, seed=1)
        asked = [Conversation((Message("user", problem.prompt),), "", problem) for problem in problems]
        scores = [scored(net, asked, threshold) for threshold in THRESHOLDS]
        parts = [f"{at}: {s.accuracy:.1f} {s.steps:.2f}" for at, s in zip(THRESHOLDS, scores, strict=True)]
        say(f"{task:9}" + "  ".join(parts))


def contact(net: Net, count: int, say: Callable[[str], None]) -> None:
    """First contact by kind, with what went wrong."""
    asked = first_contact(random.Random(1), count)
    wrong = 0
    for (kind, conversation), answer in zip(asked, answers(net, [c for _, c in asked], 0.9), strict=True):
        if not sensible(conversation.problem, answer.text):
            wrong += 1
            shown = [message.content for message in conversation.messages] or [conversation.text]
            if wrong <= 40:
                say(f"  {kind}: {shown[-2:]!r} -> {answer.text!r}, not {conversation.problem.answer!r}")
    say(f"first contact: {100 * (1 - wrong / len(asked)):.1f} % of {len(asked)}")
