"""Microseconds of an all-reduce among worker processes, by backend, number of ranks and bytes.

    python bench/groups.py --ranks 2,4 --repeats 200

As a step makes them: every rank adds up float32 activations [tokens, width]; the median over the calls of rank 0. With
fewer cores than ranks the figure is mostly the time until the others get a turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as mp

from dilaserve.transport.collectives_memory import Exchange
from dilaserve.worker.tp_group import Groups

SHAPES = ((1, 128), (32, 128), (32, 768), (256, 768), (1024, 768))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2", help="numbers of ranks, comma separated (default: 2)")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--backends", default="shm,gloo")
    args = parser.parse_args()
    print(f"{'ranks':>5} {'tokens x width':>14}" + "".join(f"{name + ', us':>12}" for name in args.backends.split(",")))
    for ranks in map(int, args.ranks.split(",")):
        columns = [measured(name, ranks, args.repeats) for name in args.backends.split(",")]
        for shape, row in zip(SHAPES, zip(*columns, strict=True), strict=True):
            print(f"{ranks:>5} {shape[0]:>6} x {shape[1]:<5}" + "".join(f"{1e6 * seconds:>12.0f}" for seconds in row))


def measured(backend: str, ranks: int, repeats: int) -> list[float]:
    """Seconds of one all-reduce by shape."""
    context = mp.get_context("spawn")
    answers, exchange = context.Queue(), Exchange(ranks)
    with tempfile.TemporaryDirectory() as place:
        arguments = (ranks, backend, exchange, f"{place}/store", repeats, answers)
        processes = [context.Process(target=member, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found: list[float] = answers.get()
        for process in processes:
            process.join()
    return found


def member(rank: int, ranks: int, backend: str, exchange: Exchange, store: str, repeats: int, answers: Any) -> None:
    torch.set_num_threads(1)
    group = Groups(backend, exchange, rank, store).join(1, range(ranks), [1] * ranks)
    found = [timed(group.all_reduce, shape, repeats) for shape in SHAPES]
    if rank == 0:
        answers.put(found)


def timed(reduce: Any, shape: Sequence[int], repeats: int) -> float:
    x, seconds = torch.ones(shape), []
    for _ in range(repeats + 10):
        began = time.perf_counter()
        reduce(x)
        seconds.append(time.perf_counter() - began)
        x.fill_(1.0)
    return statistics.median(seconds[10:])


if __name__ == "__main__":
    main()
