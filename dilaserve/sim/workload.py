"""Traffic: when requests arrive, how long they are, and what they want."""

import csv
import gzip
import math
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dilaserve.errors import ConfigError
from dilaserve.types import OnMiss

MOST_TOKENS = 10_000_000  # in a prompt or an answer that somebody means


class Job(NamedTuple):
    """One request to come: seconds after the start, tokens in and out, its task, its deadline and class.

    `shared`: tokens with which all prompts of its task begin.
    """

    at: float
    prompt_tokens: int
    max_tokens: int
    task: str | None = None
    scale: float | None = None  # deadline as a multiple of the unloaded latency; None: no deadline
    on_miss: OnMiss = "best_effort"
    shared: int = 0


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    return renewal(lambda: rng.expovariate(rate))


def gamma(rate: float, rng: random.Random, variation: float) -> Iterator[float]:
    """Gaps with a coefficient of variation above 1 come in clumps."""
    shape = 1.0 / variation**2
    return renewal(lambda: rng.gammavariate(shape, 1.0 / (rate * shape)))


def bursts(rate: float, rng: random.Random, period: float = 20.0, height: float = 3.0) -> Iterator[float]:
    """A fifth of each period at `height` times the rate, the rest lower, so that the mean is `rate`."""
    low = (1.0 - 0.2 * height) / 0.8
    now = 0.0
    while True:
        now += rng.expovariate(rate * height)
        busy = (now % period) < 0.2 * period
        if busy or rng.random() < low / height:
            yield now


def renewal(gap: Callable[[], float]) -> Iterator[float]:
    now = 0.0
    while True:
        now += gap()
        yield now


ARRIVALS = ("poisson", "gamma2", "gamma4", "bursts")


def arrivals(kind: str, rate: float, rng: random.Random) -> Iterator[float]:
    """Endless arrival times; raises `ConfigError` for an unknown kind."""
    if kind == "poisson":
        return poisson(rate, rng)
    if kind in ("gamma2", "gamma4"):
        return gamma(rate, rng, float(kind[-1]))
    if kind == "bursts":
        return bursts(rate, rng)
    raise ConfigError(f"unknown arrivals {kind!r}; one of {', '.join(ARRIVALS)}, or a trace file")


def trace(file: Path) -> list[tuple[float, int, int]]:
    """Arrival seconds, prompt tokens and output tokens from a CSV file, gzipped or not, with these three columns.

    A header line may name them `arrival_s,prompt_tokens,output_tokens`. Raises `ConfigError`.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", newline="") as lines:
            rows = csv.reader(lines)
            found = [entry(row, rows.line_num) for row in rows if row and not row[0].startswith("arrival")]
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read the trace {file}: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(
            f"the trace {file} is not a CSV of arrival seconds, prompt and output tokens: {error}"
        ) from error
    if not found:
        raise ConfigError(f"the trace {file} is empty")
    return sorted(found)


def entry(row: list[str], line: int) -> tuple[float, int, int]:
    """One line of a trace; raises `ValueError` for what no request can be."""
    try:
        at, prompt, output = float(row[0]), int(float(row[1])), int(float(row[2]))
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"line {line}: {error}") from error
    if not math.isfinite(at):
        raise ValueError(f"line {line}: an arrival is not a finite number")
    if not (1 <= prompt <= MOST_TOKENS and 1 <= output <= MOST_TOKENS):
        raise ValueError(f"line {line}: {prompt} and {output} do not both lie between 1 and {MOST_TOKENS}")
    return at, prompt, output


def scaled(rows: list[tuple[float, int, int]], rate: float, start: float = 0.0) -> Iterator[tuple[float, int, int]]:
    """The trace from the share `start` of its rows on, at another mean rate, over and over."""
    span = rows[-1][0] - rows[0][0] or 1.0
    factor = (len(rows) / span) / rate
    first = int(start * len(rows))
    began, offset = rows[first][0], 0.0
    while True:
        for at, prompt, output in rows[first:]:
            yield offset + (at - began) * factor, prompt, output
        offset += (rows[-1][0] - began) * factor or len(rows) / rate  # all at one moment: once every so many seconds
        first, began = 0, rows[0][0]


def jobs(
    times: Iterator[tuple[float, int, int]],
    seconds: float,
    limit: int,
    tasks: tuple[str | None, ...],
    scales: tuple[tuple[float | None, float], ...],
    seed: int,
    on_miss: OnMiss = "best_effort",
) -> list[Job]:
    """The requests of the first `seconds`; lengths cut so that prompt and answer fit in `limit` tokens."""
    rng = random.Random(seed)
    found: list[Job] = []
    for at, prompt, output in times:
        if at >= seconds:
            return found
        answer = max(1, min(output, limit - 1))
        prompt = max(min(2, limit - 1), min(prompt, limit - 32 * math.ceil(answer / 32)))
        scale = rng.choices([scale for scale, _ in scales], [weight for _, weight in scales])[0]
        found.append(Job(at, prompt, min(answer, limit - prompt), rng.choice(tasks), scale, on_miss))
    return found
