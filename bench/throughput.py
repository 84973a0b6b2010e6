"""Tokens per second of the engine against what a user would run without it; same weights, same prompts, one run.

    python bench/throughput.py [--rounds 3] [--requests 32] [--json FILE]
    python bench/throughput.py --family sdar|nemotron|…|all [--size 100m] [--rounds 3] [--requests 32] [--json FILE]

(a) the reference loop without a cache, (b) the published dual-cache loop, both one prompt at a time, (c) lockstep
static batches of 16 with the dual cache. Every system takes its turn in each round; figures are medians over rounds,
and ratios are to the faster of the baseline's two thread counts. "full" denoises whole canvases everywhere; "answers"
lets the engine stop at the end of an answer, as it does by default and the published loops do not.

With --family a random checkpoint of the family is written, and the engine at 1 and at 16 concurrent is compared with
the loops of the family's authors, one prompt at a time, with the caches and settings that they publish.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvloop
from baselines import Plain, loop
from families import rounds
from families.checkpoints import ARCHITECTURES, SIZES
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dilaserve import Config, Engine, Options
from dilaserve.calibrate.calibrate import machine
from dilaserve.models.checkpoint import locate
from dilaserve.profile.problems import TASKS, held_out
from dilaserve.server.app import running
from dilaserve.tokenizer.tokenizer import Text

THRESHOLD, BLOCK, STATIC = 0.9, 32, 16
CONCURRENT = (1, 4, 16, 64)
Figures = dict[str, list[float]]


def prompts_for(count: int) -> list[str]:
    """Held-out problems of all tasks, mixed."""
    each = -(-count // len(TASKS))
    problems = [problem.prompt for task in TASKS for problem in held_out(task, each, seed=5)]
    random.Random(0).shuffle(problems)
    return problems[:count]


async def crowd(ask: Callable[[int], Any], count: int, concurrent: int) -> float:
    """Seconds for `count` requests with so many in flight."""
    gate = asyncio.Semaphore(concurrent)

    async def one(i: int) -> None:
        async with gate:
            await ask(i)

    began = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(count)))
    return time.perf_counter() - began


async def engine_round(engine: Engine, ids: list[list[int]], answer: int, figures: Figures, label: str) -> None:
    for full in (True, False):
        options = Options(max_tokens=answer, confidence_threshold=THRESHOLD, block_length=BLOCK, ignore_eos=full)
        for concurrent in CONCURRENT:
            seconds = await crowd(lambda i, o=options: engine.generate(ids[i], o), len(ids), concurrent)
            kind = "full" if full else "answers"
            figures.setdefault(f"{label} {concurrent} {kind}", []).append(len(ids) / seconds)


def baseline_round(model: Plain, ids: list[list[int]], answer: int, figures: Figures, threads: int) -> None:
    torch.set_num_threads(threads)
    for label, size, dual in (("a", 1, False), ("b", 1, True), ("c", STATIC, True)):
        began = time.perf_counter()
        for first in range(0, len(ids), size):
            loop(model, ids[first : first + size], answer, BLOCK, THRESHOLD, dual)
        figures.setdefault(f"{label} {threads}", []).append(len(ids) / (time.perf_counter() - began))


async def overhead(directory: str, prompts: list[str], answer: int, figures: Figures) -> None:
    """Share of wall time that one busy single-threaded worker is not in its forward pass, at 16 concurrent."""
    options = Options(max_tokens=answer, confidence_threshold=THRESHOLD, block_length=BLOCK, ignore_eos=True)
    config = Config.of(model=directory, devices="cpu", cpu_threads=1, port=0, log_level="warning")
    async with Engine(config) as engine, running(engine, config) as address, aiohttp.ClientSession() as session:

        async def by_http(i: int) -> None:
            body = {
                "messages": [{"role": "user", "content": prompts[i]}],
                "max_tokens": answer,
                "confidence_threshold": THRESHOLD,
                "ignore_eos": True,
                "stream": True,
            }
            async with session.post(address + "/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                await response.read()

        asks = {"api": lambda i: engine.generate([{"role": "user", "content": prompts[i]}], options), "http": by_http}
        for name, ask in asks.items():
            await crowd(ask, STATIC, STATIC)
            before = engine.profile.forward, engine.profile.seconds
            seconds = await crowd(ask, len(prompts), STATIC)
            forward, worker = engine.profile.forward - before[0], engine.profile.seconds - before[1]
            figures.setdefault(f"overhead {name}", []).append(1 - forward / seconds)
            figures.setdefault(f"worker {name}", []).append(1 - worker / seconds)


async def measure(args: argparse.Namespace) -> Figures:
    directory, figures = locate(args.model), Figures()
    model, prompts = Plain(directory), prompts_for(args.requests)
    engines = {f"{devices}": Config.of(model=str(directory), devices=devices) for devices in ("cpu", "cpu,cpu")}
    console = Console(stderr=True)
    text = Text(directory)
    text.load_template()
    ids = [text.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    with Progress(console=console) as bar:
        task = bar.add_task("rounds", total=args.rounds * (len(engines) + 3))
        for _ in range(args.rounds):
            for label, config in engines.items():
                async with Engine(config) as engine:
                    await crowd(lambda i, e=engine: e.generate(ids[i], Options(max_tokens=32)), 8, 8)
                    await engine_round(engine, ids, args.tokens, figures, label)
                bar.advance(task)
            for threads in (1, 2):
                baseline_round(model, ids, args.tokens, figures, threads)
                bar.advance(task)
            await overhead(str(directory), prompts, args.tokens, figures)
            bar.advance(task)
    return figures


def report(figures: Figures, args: argparse.Namespace) -> None:
    console = Console(width=110)
    middle = {name: statistics.median(values) for name, values in figures.items()}
    best = {label: max(middle[f"{label} 1"], middle[f"{label} 2"]) for label in "abc"}
    console.print(
        f"{machine()}, torch {torch.__version__}; {args.requests} requests of {args.tokens} "
        f"tokens, threshold {THRESHOLD}, block {BLOCK}, dual cache; medians of {args.rounds} rounds"
    )
    base = Table("baseline", "1 thread, tokens/s", "2 threads, tokens/s")
    names = {"a": "(a) loop without cache", "b": "(b) dual-cache loop", "c": f"(c) static batches of {STATIC}"}
    for label, name in names.items():
        base.add_row(name, *(f"{middle[f'{label} {threads}'] * args.tokens:.0f}" for threads in (1, 2)))
    console.print(base)
    table = Table("engine", "concurrent", "full, tokens/s", "vs a", "vs b", "vs c", "answers/s", "vs a", "vs b", "vs c")
    for devices in ("cpu", "cpu,cpu"):
        for concurrent in CONCURRENT:
            full, short = middle[f"{devices} {concurrent} full"], middle[f"{devices} {concurrent} answers"]
            ratios = [f"{full / best[label]:.2f}" for label in "abc"]
            ends = [f"{short / best[label]:.2f}" for label in "abc"]
            table.add_row(devices, str(concurrent), f"{full * args.tokens:.0f}", *ratios, f"{short:.1f}", *ends)
    console.print(table)
    for name in ("api", "http"):
        console.print(
            f"16 concurrent by {name}, one worker thread: {100 * middle[f'overhead {name}']:.1f} % of wall time "
            f"outside forward pass and unmasking, {100 * middle[f'worker {name}']:.1f} % outside the worker's step"
        )


async def measure_families(args: argparse.Namespace) -> list[rounds.Row]:
    found, names = [], list(ARCHITECTURES) if args.family == "all" else [args.family]
    with Progress(console=Console(stderr=True)) as bar:
        for family in bar.track(names, description="families"):
            found += await rounds.measured(family, args.size, args.requests, args.tokens, args.rounds)
    return found


def report_families(rows: list[rounds.Row], args: argparse.Namespace) -> None:
    console = Console(width=140)
    console.print(
        f"{machine()}, torch {torch.__version__}; random weights, {args.size}; {args.requests} requests of "
        f"{args.tokens} tokens, prompts of {rounds.PROMPT[0]} to {rounds.PROMPT[1]}; medians of {args.rounds} rounds"
    )
    columns = ["family", "authors' loop", "threads", "tokens a pass", "tokens/s"]
    for concurrent in rounds.CONCURRENT:
        columns += [f"engine, {concurrent} concurrent", "ratio"]
    table = Table(*columns, "same tokens")
    for row in rows:
        loop = [str(row.threads), f"{row.tokens_per_pass:.2f}", f"{row.loop_speed:.0f}"]
        for speed in row.engine_speeds.values():
            loop += [f"{speed:.0f}", f"{speed / row.loop_speed:.2f}"]
        table.add_row(row.family, row.loop, *loop, f"{row.same} of {row.answers}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dilaserve-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="answer canvas of every request (default 64)")
    parser.add_argument("--family", choices=[*ARCHITECTURES, "all"], help="compare with this family's own loops")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of the family's checkpoint (default tiny)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    if args.family:
        logging.getLogger("dilaserve").setLevel(logging.ERROR)  # the checkpoints have no chat template
        rows = uvloop.run(measure_families(args))
        report_families(rows, args)
        figures: object = [row._asdict() for row in rows]
    else:
        figures = uvloop.run(measure(args))
        report(figures, args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
