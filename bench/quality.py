"""Accuracy and steps of the bundled model by task, confidence threshold and cache kind, on held-out problems.

    python bench/quality.py [--per-task 200] [--caches dual,prefix,none] [--markdown FILE]

Every problem is asked through the engine, greedily, and the answer checked by the task's rule. Intervals: 95 %, Wilson.
"""

import argparse
import asyncio
import math
import os
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from dilaserve import Config, Engine, Options
from dilaserve.config import CacheKind
from dilaserve.profile.problems import TASKS, Problem, check, held_out

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


class Sample(NamedTuple):
    """One problem under one setting."""

    right: bool
    steps: int
    tokens: int


class Cell(NamedTuple):
    """All samples of a task under one setting."""

    share: float
    low: float
    high: float
    steps: float
    tokens_per_step: float


def cell(samples: list[Sample]) -> Cell:
    right, steps = sum(sample.right for sample in samples), sum(sample.steps for sample in samples)
    low, high = wilson(right, len(samples))
    tokens = sum(sample.tokens for sample in samples)
    return Cell(right / len(samples), low, high, steps / len(samples), tokens / steps)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    z, share = 1.96, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - spread, centre + spread


async def ask(engine: Engine, problem: Problem, threshold: float, cache: CacheKind, max_tokens: int) -> Sample:
    options = Options(max_tokens=max_tokens, confidence_threshold=threshold, cache=cache)
    answer = await engine.generate([{"role": "user", "content": problem.prompt}], options)
    return Sample(check(problem, answer.text), answer.usage.steps, answer.completion_tokens + 1)


async def measure(args: argparse.Namespace) -> dict[tuple[str, float, str], Cell]:
    problems = {task: held_out(task, args.per_task, args.seed) for task in TASKS}
    settings = [(cache, threshold) for cache in args.caches for threshold in args.thresholds]
    table: dict[tuple[str, float, str], Cell] = {}
    room = len(TASKS) * args.per_task
    async with Engine(Config.of(model=args.model, devices=args.devices, max_queue=room)) as engine:
        for cache, threshold in track(settings, description="settings", console=Console(stderr=True)):
            everything = [problem for task in problems.values() for problem in task]
            samples = await asyncio.gather(
                *(ask(engine, problem, threshold, cache, args.max_tokens) for problem in everything)
            )
            for task in TASKS:
                mine = [sample for sample, problem in zip(samples, everything, strict=True) if problem.task == task]
                table[cache, threshold, task] = cell(mine)
            table[cache, threshold, "all"] = cell(list(samples))
    return table


def markdown(table: dict[tuple[str, float, str], Cell], args: argparse.Namespace) -> str:
    """Rows of settings; per task the accuracy in percent and its interval, and the steps."""
    lines = []
    for cache in args.caches:
        lines += [f"Cache `{cache}`, {args.per_task} held-out problems a task: accuracy % (95 % interval) · steps", ""]
        lines += ["| threshold | " + " | ".join(TASKS) + " | all | steps | tokens a step |"]
        lines += ["|---" * (len(TASKS) + 4) + "|"]
        for threshold in args.thresholds:
            cells = [table[cache, threshold, task] for task in TASKS]
            total = table[cache, threshold, "all"]
            shown = " | ".join(f"{interval(c)} · {c.steps:.1f}" for c in cells)
            end = f"{interval(total)} | {total.steps:.2f} | {total.tokens_per_step:.2f}"
            lines.append(f"| {threshold} | {shown} | {end} |")
        lines.append("")
    return "\n".join(lines)


def interval(c: Cell) -> str:
    return f"{100 * c.share:.1f} ({100 * c.low:.0f} to {100 * c.high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--devices", default=",".join(["cpu"] * (os.cpu_count() or 1)))
    parser.add_argument("--per-task", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=96, help="canvas for the answer (default 96)")
    parser.add_argument("--thresholds", type=lambda s: [float(v) for v in s.split(",")], default=list(THRESHOLDS))
    parser.add_argument("--caches", type=lambda s: s.split(","), default=["dual", "prefix", "none"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    text = markdown(asyncio.run(measure(args)), args)
    print(text)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
