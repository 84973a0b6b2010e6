"""Seconds that the scheduler takes to decide, by rows in the scheduler.

    python bench/decisions.py [--sizes 16x1,64x1,256x1,16x8,64x8,256x8,1000x8,10000x64]

The scheduler alone, on steps that a law and chance make up: every decision starts one step on the instance that has
just come back, and each quarter of a second one also looks at those that wait. With deadlines six rows of each instance
are guaranteed and the others wait: until far deadlines, or until near ones, of which most are missed. Without, all run
as they came. A size is requests x instances. Times are those of the processor; the
goals are for the longest decision. A quote for one more request of the same kind is asked for after each decision.
"""

import argparse
import random
import statistics
import time
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dilaserve.config import Config
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.types import (
    Arrival,
    Batch,
    Command,
    Decline,
    Decoding,
    Finish,
    Instance,
    InstanceReady,
    Launch,
    Refuse,
    Request,
    RowResult,
    Slo,
    StepDone,
)


def request(number: int, row: int, now: float, seconds: float | None) -> Request:
    return Request(
        id=f"r{number}",
        row=row,
        generation=number,
        prompt_tokens=200,
        canvas_tokens=456,
        max_tokens=256,
        arrived_at=now,
        decoding=Decoding(),
        slo=Slo(seconds=seconds),
    )


class Took(NamedTuple):
    """Seconds of each decision, and of a quote behind it."""

    decisions: list[float]
    quotes: list[float]


def decide(rows: int, instances: int, seconds: float | None, decisions: int) -> Took:
    """What is taken while `rows` requests are in the scheduler."""
    profile, rng = llada_8b_h200(), random.Random(0)
    law = next(iter(profile.costs.values()))
    config = Config.of(max_num_seqs=64, max_queue=4096 + 2 * rows, best_effort_backlog=1e9)
    machine = Scheduler(config, {1: law}, profile.quality)
    now, number = 0.0, 0
    in_flight: list[tuple[float, Batch]] = []
    took: list[float] = []
    quoted: list[float] = []

    def perform(commands: list[Command]) -> None:
        nonlocal number
        for command in commands:
            if isinstance(command, Launch):
                in_flight.append((now + rng.uniform(0.01, 0.03), command.batch))
            elif isinstance(command, Finish | Refuse | Decline):
                arrive(command.request.row)

    def arrive(row: int) -> None:
        nonlocal number
        number += 1
        perform(list(machine.observe(Arrival(request(number, row, now, seconds)), now)))

    for id in range(instances):
        perform(list(machine.observe(InstanceReady(Instance(id, (id,), 10**7)), now)))
    for row in range(rows):
        arrive(row)
    perform(list(machine.decide(now)))
    while len(took) < decisions:
        in_flight.sort(key=lambda one: one[0], reverse=True)
        now, batch = in_flight.pop()
        results = []
        for span in batch.spans:
            left = max(0, machine.placement.replicas[batch.instance].residents[span.row].masks - rng.randint(2, 8))
            results.append(RowResult(span.row, span.generation, 4, left, span.block_end - left, -1, 3.8))
        perform(list(machine.observe(StepDone(batch.instance, batch.id, tuple(results), 0.02, 0.02), now)))
        began = time.thread_time()
        commands = list(machine.decide(now))
        took.append(time.thread_time() - began)
        perform(commands)
        began = time.thread_time()
        machine.quotes.quote(request(0, -1, now, seconds), now)
        quoted.append(time.thread_time() - began)
    return Took(took[decisions // 5 :], quoted[decisions // 5 :])


GOALS = {(1000, 8): 5.0, (10000, 64): 10.0}  # ms that no decision takes


def sizes(text: str) -> list[tuple[int, int]]:
    return [(int(rows), int(instances)) for rows, _, instances in (size.partition("x") for size in text.split(","))]


def middle_and_tail(ordered: list[float]) -> tuple[float, float]:
    return statistics.median(ordered), ordered[int(0.99 * len(ordered))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=sizes, default="16x1,64x1,256x1,16x8,64x8,256x8,1000x8,10000x64")
    parser.add_argument("--decisions", type=int, default=1500)
    args = parser.parse_args()
    heads = ("median, ms", "p99, ms", "longest, ms", "goal", "quote: median, ms", "p99, ms")
    table = Table("requests", "instances", "deadlines", *heads)
    for rows, instances in args.sizes:
        for name, seconds in (("no", None), ("far", 600.0), ("near", 2.0)):
            found = decide(rows, instances, seconds, args.decisions)
            took, quotes = (sorted(1000 * one for one in each) for each in found)
            goal = f"{GOALS[rows, instances]:g}" if (rows, instances) in GOALS else ""
            figures = [f"{one:.3f}" for one in (*middle_and_tail(took), took[-1])]
            quoted = [f"{one:.3f}" for one in middle_and_tail(quotes)]
            table.add_row(str(rows), str(instances), name, *figures, goal, *quoted)
    Console().print(table)


if __name__ == "__main__":
    main()
