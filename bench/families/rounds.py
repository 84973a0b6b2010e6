"""One family: the authors' loops and the engine in turns, on one checkpoint and the same prompts."""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dilaserve import Config, Engine
from dilaserve.system import host
from families import checkpoints
from families.cases import CASES, Case
from families.layers import Plain

CONCURRENT = (1, 16)
PROMPT = (32, 96)  # tokens of the shortest and the longest prompt
BLOCK = 32  # tokens of the longest block
Tokens = list[list[int]]


class Row(NamedTuple):
    """A family beside one of its loops; speeds are medians over rounds, in tokens per second."""

    family: str
    loop: str
    threads: int  # of the loop, the better number
    tokens_per_pass: float  # of the loop
    loop_speed: float
    engine_speeds: dict[int, float]  # by how many requests are in flight
    same: int  # answers of the engine that are the loop's, of `answers`
    answers: int


async def crowd(ask: Callable[[int], Any], count: int, concurrent: int) -> tuple[float, list[Any]]:
    """Seconds for `count` requests with so many in flight, and what they gave."""
    gate = asyncio.Semaphore(concurrent)

    async def one(i: int) -> Any:
        async with gate:
            return await ask(i)

    began = time.perf_counter()
    found = await asyncio.gather(*(one(i) for i in range(count)))
    return time.perf_counter() - began, found


def prompts_for(count: int, seed: int = 0) -> Tokens:
    """Random bytes, of random lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(checkpoints.BYTES) for _ in range(rng.randint(*PROMPT))] for _ in range(count)]


async def measured(family: str, size: str, requests: int, answer: int, rounds: int) -> list[Row]:
    """Write the family's checkpoint, and compare the engine with each loop on it."""
    with tempfile.TemporaryDirectory(prefix="dilaserve-bench-") as place:
        directory = checkpoints.make(Path(place) / family, family, size)
        model, prompts = Plain(directory), prompts_for(requests)
        return [await compared(family, case, directory, model, prompts, answer, rounds) for case in CASES[family]]


async def compared(
    family: str, case: Case, directory: Path, model: Plain, prompts: Tokens, answer: int, rounds: int
) -> Row:
    threads = better_threads(case, model, prompts[0])
    speeds: dict[int, list[float]] = {concurrent: [] for concurrent in (0, *CONCURRENT)}
    for _ in range(rounds):
        torch.set_num_threads(threads)
        seconds, tokens, passes = looped(case, model, prompts, answer)
        speeds[0].append(len(prompts) * answer / seconds)
        async with Engine(Config.of(model=str(directory), devices="cpu", log_level="error")) as engine:
            options = case.options(answer)
            await crowd(lambda i: engine.generate(prompts[i], options), min(4, len(prompts)), 4)  # noqa: B023
            for concurrent in CONCURRENT:
                seconds, answers = await crowd(
                    lambda i: engine.generate(prompts[i], options),  # noqa: B023
                    len(prompts),
                    concurrent,
                )
                speeds[concurrent].append(len(prompts) * answer / seconds)
    same = sum(list(one.token_ids) == wanted for one, wanted in zip(answers, tokens, strict=True))
    middle = {concurrent: statistics.median(found) for concurrent, found in speeds.items()}
    per_pass = len(prompts) * answer / passes
    return Row(family, case.name, threads, per_pass, middle.pop(0), middle, same, len(prompts))


def looped(case: Case, model: Plain, prompts: Tokens, answer: int) -> tuple[float, Tokens, int]:
    """Seconds, answers and forward passes of the loop for all prompts, one after the other."""
    began, tokens, passes = time.perf_counter(), [], 0
    for prompt in prompts:
        found, count = case.loop(model, torch.tensor(prompt), answer)
        tokens.append(found)
        passes += count
    return time.perf_counter() - began, tokens, passes


def better_threads(case: Case, model: Plain, prompt: list[int]) -> int:
    """One thread or all cores, whichever is faster for one prompt and a block."""

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        return looped(case, model, [prompt], BLOCK)[0]

    seconds(1)  # the first run is slower
    return min((1, host.cores()), key=seconds)
