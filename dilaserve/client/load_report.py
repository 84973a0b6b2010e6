"""What a load test found: percentiles, attainment, rates and errors, as a value, as text and as a picture."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from dilaserve.client.load import Outcome

PERCENTILES = (50, 90, 95, 99)


class Report(msgspec.Struct, frozen=True):
    """Seconds by percentile; rates over `seconds`, which is from the first intended moment to the last end."""

    requests: int
    answered: int
    planned: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    deadline: float | None
    attainment: float | None  # share of all requests that ended in time; those that failed are late
    first_token: dict[str, float]
    end_to_end: dict[str, float]
    largest_lag: float  # seconds that the client itself was late with sending
    errors: dict[str, int]


def report(outcomes: Sequence[Outcome], planned: int, deadline: float | None) -> Report:
    """The figures of what was seen so far, which may be nothing."""
    answered = [one for one in outcomes if one.end is not None]
    span = max((one.at + (one.end or 0.0) for one in outcomes), default=0.0) - min(
        (one.at for one in outcomes), default=0.0
    )
    rate = 1.0 / span if span > 0 else 0.0
    return Report(
        requests=len(outcomes),
        answered=len(answered),
        planned=planned,
        seconds=span,
        requests_per_second=len(answered) * rate,
        tokens_per_second=sum(one.tokens for one in answered) * rate,
        deadline=deadline,
        attainment=sum(bool(one.met) for one in outcomes) / len(outcomes) if deadline and outcomes else None,
        first_token=percentiles([one.first for one in answered if one.first is not None]),
        end_to_end=percentiles([one.end for one in answered if one.end is not None]),
        largest_lag=max((one.lag for one in outcomes), default=0.0),
        errors=dict(Counter(one.error for one in outcomes if one.error).most_common()),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """By name, p50 to p99 and the mean; empty without values."""
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    return {"mean": float(np.mean(values))} | {
        f"p{at}": float(value) for at, value in zip(PERCENTILES, found, strict=True)
    }


def lines(found: Report) -> Iterator[str]:
    sent = f"{found.requests} ended, {found.planned} planned"
    yield f"requests      {found.answered} answered, {sent}, {found.seconds:.1f} s"
    yield f"throughput    {found.requests_per_second:.2f} requests/s, {found.tokens_per_second:.1f} tokens/s"
    for name, times in (("first token", found.first_token), ("end to end", found.end_to_end)):
        shown = "   ".join(f"{key} {1000 * value:.0f} ms" for key, value in times.items())
        yield f"{name:<13} {shown or 'none'}"
    if found.attainment is not None and found.deadline is not None:
        yield f"deadlines     {100 * found.attainment:.1f} % within {1000 * found.deadline:.0f} ms"
    yield f"errors        {', '.join(f'{count} {kind}' for kind, count in found.errors.items()) or 'none'}"
    if found.largest_lag > 0.1:
        yield f"the client was {found.largest_lag:.2f} s late with sending at worst; times include that"


def plot(outcomes: Sequence[Outcome], deadline: float | None, file: Path) -> None:
    """End-to-end times over the run, and how many were done within how many seconds (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 4.2), layout="constrained")
    done = [(one.at, one.end) for one in outcomes if one.end is not None]
    left.scatter([at for at, _ in done], [end for _, end in done], s=10, alpha=0.6, label="answered")
    failed = [one.at for one in outcomes if one.error]
    left.scatter(failed, [0.0] * len(failed), s=14, marker="x", color="C3", label="failed")
    left.set(xlabel="intended moment, s", ylabel="end to end, s")
    for label, values in (
        ("first token", sorted(one.first for one in outcomes if one.first is not None)),
        ("end to end", sorted(end for _, end in done)),
    ):
        right.step(values, [(i + 1) / len(outcomes) for i in range(len(values))], where="post", label=label)
    if deadline:
        left.axhline(deadline, color="black", linewidth=0.8)
        right.axvline(deadline, color="black", linewidth=0.8, label="deadline")
    right.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
    left.legend()
    right.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
