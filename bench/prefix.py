"""What a shared system prompt saves: time to the first block with its K/V reused, and without.

    python bench/prefix.py [--families sdar,nemotron,nemotron:8] [--size 100m] [--system 512] [--rounds 5] [--json FILE]

A checkpoint of random weights is written for each family. In each round a request whose system prompt nobody has sent
before is followed by one whose system prompt is that of all other rounds; both have their own 32 tokens behind it and
ask for one block, and nothing else runs. Figures are medians over rounds. The first block takes a prefill of what is
new, and its own steps, which no reuse can save: their number is printed, and the time of a request of one block without
a system prompt. A number behind a family's name is another block length (NVIDIA evaluates Nemotron with 8).
"""

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import uvloop
from families import checkpoints
from families.cases import CASES
from rich.console import Console
from rich.table import Table

from dilaserve import Config, Engine, Options, Usage
from dilaserve.calibrate.calibrate import machine
from dilaserve.types import PAGE

QUESTION = 32  # tokens of a request's own
GOAL = 5.0  # times shorter


class Row(NamedTuple):
    """Seconds until a request's first block is there, medians; tokens of its prompt that were reused."""

    family: str
    block: int
    without: float  # the system prompt is new
    reused: float  # another request has had it
    question: float  # there is no system prompt
    cached_tokens: int
    steps: float  # mean, of a request whose system prompt is reused


async def measured(family: str, block: int | None, size: str, system: int, rounds: int) -> Row:
    published = CASES[family][0].options(1)
    block = block or published.block_length or 1
    options = msgspec.structs.replace(published, max_tokens=block, block_length=block)
    with tempfile.TemporaryDirectory(prefix="dilaserve-bench-") as place:
        directory = checkpoints.make(Path(place) / family, family, size)
        async with Engine(Config.of(model=str(directory), devices="cpu", log_level="error")) as engine:
            return await timed(engine, family, options, system, rounds)


async def timed(engine: Engine, family: str, options: Options, system: int, rounds: int) -> Row:
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(checkpoints.BYTES) for _ in range(count)]

    async def seconds(prompt: list[int]) -> tuple[float, Usage]:
        began = time.perf_counter()
        answer = await engine.generate(prompt, options)
        return time.perf_counter() - began, answer.usage

    shared, whole = some(system), system // PAGE * PAGE
    await seconds(shared + some(QUESTION))
    found: dict[str, list[float]] = {"without": [], "reused": [], "question": []}
    steps = []
    for _ in range(rounds):
        prompts = {"without": some(system + QUESTION), "reused": shared + some(QUESTION), "question": some(QUESTION)}
        for kind, prompt in prompts.items():
            taken, usage = await seconds(prompt)
            found[kind].append(taken)
            assert usage.cached_prompt_tokens == (whole if kind == "reused" else 0), (kind, usage)
            steps += [usage.steps] if kind == "reused" else []
    middle = {kind: statistics.median(values) for kind, values in found.items()}
    return Row(family, options.block_length or 0, **middle, cached_tokens=whole, steps=statistics.mean(steps))


def report(rows: list[Row], args: argparse.Namespace) -> None:
    console = Console(width=120)
    console.print(
        f"{machine()}, torch {torch.__version__}; random weights, {args.size}; a system prompt of {args.system} "
        f"tokens, {QUESTION} of the request's own; medians of {args.rounds} rounds"
    )
    table = Table(
        "family", "block", "without reuse, ms", "reused, ms", "ratio", f"goal {GOAL:g}", "steps", "no system prompt, ms"
    )
    for row in rows:
        ratio = row.without / row.reused
        times = [f"{1000 * row.without:.1f}", f"{1000 * row.reused:.1f}"]
        met = "met" if ratio >= GOAL else "missed"
        table.add_row(
            row.family, str(row.block), *times, f"{ratio:.1f}", met, f"{row.steps:.1f}", f"{1000 * row.question:.1f}"
        )
    console.print(table)


async def measure(args: argparse.Namespace) -> list[Row]:
    rows = []
    for case in args.families.split(","):
        family, _, block = case.partition(":")
        rows.append(await measured(family, int(block) if block else None, args.size, args.system, args.rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="sdar,nemotron,nemotron:8", help="NAME or NAME:BLOCK,…")
    parser.add_argument("--size", choices=list(checkpoints.SIZES), default="100m")
    parser.add_argument("--system", type=int, default=512, help="tokens of the system prompt (default 512)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    logging.getLogger("dilaserve").setLevel(logging.ERROR)  # the checkpoints have no chat template
    rows = uvloop.run(measure(args))
    report(rows, args)
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
