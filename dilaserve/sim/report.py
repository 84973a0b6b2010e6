"""What a run amounts to: attainment, latency, accuracy, waste; as text, as a file, as a picture."""

import statistics
from collections.abc import Sequence

import msgspec

from dilaserve.sim.run import Run


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Over all requests that arrived after the first `warm_up` seconds, `rate` of them a second.

    Seconds, shares from 0 to 1, points of accuracy.
    A request with a deadline counts as missed when it was late, declined, or failed. `wasted` is the share of device
    time on requests that missed, `shed` the share of requests that were declined.
    """

    requests: int
    seconds: float
    warm_up: float
    rate: float
    attainment: float | None
    shed: float
    wasted: float
    mean_latency: float
    p50: float
    p95: float
    p99: float
    mean_queued: float
    mean_threshold: float
    expected_drop: float
    steps: float


def report(run: Run, seconds: float, warm_up: float = 0.1) -> Report:
    """The first share `warm_up` of the time is left out."""
    outcomes = [outcome for outcome in run.outcomes if outcome.at >= warm_up * seconds]
    served = [outcome for outcome in outcomes if outcome.usage is not None and outcome.latency is not None]
    usages = [outcome.usage for outcome in served if outcome.usage]
    latencies = sorted(outcome.latency for outcome in served if outcome.latency is not None)
    timed = [outcome for outcome in outcomes if outcome.scale is not None]
    thresholds = [usage.mean_threshold for usage in usages if usage.mean_threshold is not None]
    totals = [engine.scheduler.totals for engine in run.engines]
    device = sum(one.device for one in totals)
    return Report(
        requests=len(outcomes),
        seconds=seconds,
        warm_up=warm_up * seconds,
        rate=len(outcomes) / (seconds * (1 - warm_up)),
        attainment=sum(bool(outcome.met) for outcome in timed) / len(timed) if timed else None,
        shed=1 - len(served) / len(outcomes) if outcomes else 0.0,
        wasted=sum(one.wasted for one in totals) / device if device else 0.0,
        mean_latency=mean(latencies),
        p50=quantile(latencies, 0.5),
        p95=quantile(latencies, 0.95),
        p99=quantile(latencies, 0.99),
        mean_queued=mean([usage.queued for usage in usages]),
        mean_threshold=mean(thresholds),
        expected_drop=mean([usage.expected_accuracy_drop for usage in usages]),
        steps=mean([float(usage.steps) for usage in usages]),
    )


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def lines(report: Report) -> list[str]:
    if not report.requests:
        return [f"nothing arrived after the warm-up of {report.warm_up:g} s; raise --rate or --seconds"]
    met = "no deadlines" if report.attainment is None else f"{100 * report.attainment:.1f} % of deadlines met"
    return [
        f"{report.requests} requests, {report.rate:.2f} a second, after a warm-up of {report.warm_up:g} s: "
        f"{met}, {100 * report.shed:.1f} % declined",
        f"latency of served requests: mean {report.mean_latency:.3f} s, p50 {report.p50:.3f}, p95 {report.p95:.3f}, "
        f"p99 {report.p99:.3f}; queued {report.mean_queued:.3f}",
        f"mean threshold {report.mean_threshold:.3f}, {report.steps:.1f} steps a request, expected accuracy drop "
        f"{report.expected_drop:.2f} points, {100 * report.wasted:.1f} % of device time on requests that missed",
    ]
