"""Problems as batches to learn from: prompts, answers, and which tokens of an answer are masked."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dilaserve.profile.problems import Problem, training
from training.network import BLOCK
from training.tokenizer import ASSISTANT, BOS, EOS, EOT, MASK, USER, tokenizer

MIX = {"add": 0.2, "chain": 0.23, "word": 0.22, "sort": 0.18, "reverse": 0.07, "json": 0.1}
FRONTIER = 6  # masked tokens from the left that count in full; those behind them depend on what is not there yet
Share = Callable[[], float]


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]


def encoded(problem: Problem) -> Example:
    prompt = tokenizer().encode(problem.prompt, add_special_tokens=False).ids
    answer = tokenizer().encode(problem.answer, add_special_tokens=False).ids
    return Example([BOS, USER, *prompt, EOT, ASSISTANT], answer)


class Batch(NamedTuple):
    noisy: torch.Tensor  # [rows, length], with masks
    clean: torch.Tensor  # [rows, length]
    weight: torch.Tensor  # [rows, length], 0 where nothing is learned
    places: torch.Tensor  # [rows, length], positions in the canvas
    seen: torch.Tensor | None  # [rows, 1, length, length], which position attends to which; None: all to all


def examples(rng: random.Random, hardness: Share, mix: dict[str, float]) -> Iterator[Example]:
    streams = {name: training(name, rng, hardness) for name in mix}
    while True:
        yield encoded(next(streams[rng.choices(list(streams), list(mix.values()))[0]]))


def canvases(source: Iterator[Example], rng: random.Random, full: float) -> tuple[Example, int]:
    """An example and its canvas length: a few ends after the answer, or whole blocks in a share `full`."""
    example = next(source)
    end = len(example.answer) + rng.randint(1, 6)
    if rng.random() < full:
        end = (-(-(len(example.answer) + 1) // BLOCK) + rng.choice((0, 0, 0, 1, 1, 2, 3))) * BLOCK
    return example, len(example.prompt) + end


def batches(
    rng: random.Random,
    tokens: int,
    full: Callable[[], float],
    hardness: Callable[[], float],
    streams: Callable[[], float],
    mix: dict[str, float],
) -> Iterator[Batch]:
    """Batches of about `tokens` tokens of like length; the longest sets the canvas, the others get more ends."""
    source = examples(rng, hardness, mix)
    while True:
        double = rng.random() < streams()
        if double:
            items = [(example, cost(example)) for example in itertools.islice(source, 1500)]
        else:
            items = [canvases(source, rng, full()) for _ in range(1500)]
        groups: list[list[tuple[Example, int]]] = [[]]
        for item in sorted(items, key=lambda item: item[1]):
            if groups[-1] and item[1] * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            batch, length = [example for example, _ in group], max(length for _, length in group)
            yield two_streams(batch, length, rng) if double else collate(batch, length, rng)


def cost(example: Example) -> int:
    return len(example.prompt) + 2 * (len(example.answer) + 2)


def two_streams(group: list[Example], length: int, rng: random.Random) -> Batch:
    """Rows of prompt, answer in clear, answer masked; the answer ends with two end tokens."""
    clean = torch.full((len(group), length), EOS)
    noisy = clean.clone()
    weight = torch.zeros(len(group), length)
    places = torch.zeros(len(group), length, dtype=torch.long)
    level = torch.full((len(group), length), 10_000)  # the chunk a clear token lies in; the prompt is chunk 0
    masked = torch.zeros(len(group), length, dtype=torch.bool)
    for row, example in enumerate(group):
        start, answer = len(example.prompt), [*example.answer, EOS, EOS]
        middle, end = start + len(answer), start + 2 * len(answer)
        clean[row, :end] = torch.tensor(example.prompt + answer + answer)
        noisy[row, :middle] = clean[row, :middle]
        noisy[row, middle:end] = MASK
        places[row, :middle] = torch.arange(middle)
        places[row, middle:end] = torch.arange(start, middle)
        size = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6, 12))
        shift = rng.randrange(size)
        chunks = (torch.arange(len(answer)) + shift) // size + 1
        level[row, :start] = 0
        level[row, start:middle], level[row, middle:end] = chunks, chunks
        masked[row, middle:end] = True
        order = (torch.arange(len(answer)) + shift) % size
        weight[row, middle:end] = torch.where(order < FRONTIER, 1.0, 0.25)
        weight[row, end - 1] = 0.1
        weight[row] /= weight[row].sum().sqrt()
    ours, theirs = level[:, :, None], level[:, None, :]
    clear_seen = ~masked[:, None, :] & torch.where(masked[:, :, None], theirs < ours, theirs <= ours)
    seen = clear_seen | (masked[:, :, None] & masked[:, None, :] & (theirs == ours))
    return Batch(noisy, clean, weight, places, seen[:, None])


def collate(group: list[Example], length: int, rng: random.Random) -> Batch:
    clean = torch.full((len(group), length), EOS)
    noisy = torch.full((len(group), length), MASK)
    weight = torch.zeros(len(group), length)
    for row, example in enumerate(group):
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        clean[row, :end] = torch.tensor(example.prompt + example.answer)
        noisy[row, :start] = clean[row, :start]
        block, masked = masks(len(example.answer), length - start, rng)
        noisy[row, start : start + block] = clean[row, start : start + block]
        for order, at in enumerate(masked):
            noisy[row, start + at] = MASK
            weight[row, start + at] = 0.1 if start + at > end else 1.0 if order < FRONTIER else 0.25
        weight[row] /= weight[row].sum().sqrt()
    return Batch(noisy, clean, weight, torch.arange(length).expand(len(group), -1), None)


def masks(answer: int, room: int, rng: random.Random) -> tuple[int, list[int]]:
    """The end of the active block, and the positions masked in it, both counted from the start of the answer."""
    first = rng.randrange(0, answer + 1, BLOCK)
    last = min(first + BLOCK, room)
    body = list(range(first, min(last, answer + 1)))
    style = rng.random()
    if style < 0.25:
        masked = set(body)
    elif style < 0.8:  # a visible prefix, then a short ragged edge, then all masked
        cut, edge, shown = rng.choice(body), rng.randint(0, 10), rng.random()
        masked = {at for at in body if at >= cut and (at >= cut + edge or rng.random() > shown)} or {body[-1]}
    else:
        share = rng.random()
        masked = {at for at in body if rng.random() < share} or {rng.choice(body)}
    tail = range(answer + 1, last)
    shown = rng.choice((0.0, 0.0, 1.0, rng.random()))
    if shown == 1.0 and answer < last:
        masked.discard(answer)  # the length is known already
    masked |= {at for at in tail if rng.random() >= shown}
    return last, sorted(masked or {body[0]})
