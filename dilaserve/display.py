"""How loading looks on a terminal: one bar per device. Prints nothing where nobody watches."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

STEADY = 3600.0  # seconds over which speed is averaged for the time remaining, so that it does not jump


@contextlib.contextmanager
def loading() -> Iterator[Callable[[str, int, int], None]]:
    """A callback for progress (device, bytes placed, bytes in all), which draws while the block runs.

    A bar vanishes when its model is whole, so that only the ready line stays.
    """
    if not sys.stderr.isatty():
        yield lambda device, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading on {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def show(device: str, done: int, total: int) -> None:
            if device not in tasks:
                tasks[device] = bars.add_task(device, total=total)
            bars.update(tasks[device], completed=done, visible=done < total)

        yield show


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """A callback for progress (what, done, total) that draws one bar for each; silent where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=STEADY) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:  # what is done by then tells nothing of the speed
                tasks[what] = bars.add_task(what, total=total, completed=done)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, the first a head, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
