"""Profiles from data sheets: what they say of each model, and how far they are from what a card has measured.

    python bench/data_sheets.py

Prints, for each built-in model on an H200, its weights, K/V bytes of a token and seconds of steps by degree; and for
LLaDA-8B's shapes the error against the steps in bench/results/NVIDIA-H200.md, of `h200` too, which has older figures.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dilaserve import models
from dilaserve.profile.profile_file import cost_key
from dilaserve.profile.step_cost import Features, StepCost
from dilaserve.sim.data_sheet import pretended_model
from dilaserve.sim.h200 import law_at
from dilaserve.sim.published import FOLDER, NAMES

RESULTS = Path(__file__).parent / "results" / "NVIDIA-H200.md"
CANVAS, BLOCK = 512, 32  # of the measured reuse steps
SHAPES = "llada-8b"
REUSE = re.compile(r"^\| (\d+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", re.M)
REFRESH = re.compile(r"^\| \d+ \| (\d+) x (\d+) \| ([\d.]+) \| [\d.]+ \| \d+ % \|$", re.M)


class Measured(NamedTuple):
    name: str
    features: Features
    seconds: float


def measured(text: str) -> Iterator[Measured]:
    """Reuse and refresh steps of a page of results. Half of a block's tokens are taken to be masked."""
    for rows, ms in REUSE.findall(text):
        n = int(rows)
        features = Features(BLOCK * n, BLOCK * CANVAS * n, CANVAS * n, BLOCK * n // 2, n)
        yield Measured(f"reuse of {n}", features, float(ms) / 1e3)
    for rows, canvas, ms in REFRESH.findall(text):
        n, length = int(rows), int(canvas)
        features = Features(n * length, n * length**2, n * length, 0, n)
        yield Measured(f"refresh of {n} x {length}", features, float(ms) / 1e3)


def errors() -> Table:
    table = Table("step", "measured, ms", "data sheet, ms", "error, %", "h200, ms", "error, %")
    laws = pretended_model(SHAPES).profile.costs[cost_key("cuda")], law_at(1)
    sums = [0.0, 0.0]
    steps = list(measured(RESULTS.read_text()))
    for step in steps:
        cells = [step.name, f"{1e3 * step.seconds:.2f}"]
        for place, law in enumerate(laws):
            seconds = law.seconds(step.features)
            sums[place] += abs(seconds / step.seconds - 1)
            cells += [f"{1e3 * seconds:.2f}", f"{100 * (seconds / step.seconds - 1):+.0f}"]
        table.add_row(*cells)
    means = [f"{100 * one / len(steps):.0f}" for one in sums]
    table.add_row("mean of the absolute errors", "", "", means[0], "", means[1])
    return table


def summary() -> Table:
    table = Table(
        "model", "degree", "parameters, 1e9", "K/V a token, KB", "1 block, ms", "8 blocks, ms", "1024 tokens, ms"
    )
    for name in NAMES:
        spec, model = models.outline(FOLDER / name), pretended_model(name)
        for degree in model.degrees:
            law, block = model.profile.costs[cost_key("cuda", degree)], model.traits.block_length or BLOCK
            cells = [f"{1e3 * seconds:.2f}" for seconds in seconds_of(law, block)]
            table.add_row(
                name, str(degree), f"{spec.parameters / 1e9:.2f}", f"{spec.kv_elements * 2 / 1e3:.0f}", *cells
            )
    return table


def seconds_of(law: StepCost, block: int) -> list[float]:
    """A step of one open block and of eight, of canvases of 512 tokens, and of 1024 tokens of a prompt."""
    found = [Features(n * block, n * block * CANVAS, n * CANVAS, n * block // 2, n) for n in (1, 8)]
    return [law.seconds(features) for features in (*found, Features(1024, 1024**2, 1024, 0, 1))]


if __name__ == "__main__":
    console = Console()
    console.print(summary())
    console.print(errors())
