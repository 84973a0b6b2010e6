"""What Prometheus reads: counts since the start, and what runs and waits now."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dilaserve.engine.engine import Engine


class EngineCollector(Collector):
    """Reads the engine whenever it is asked; nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, scheduler = self.engine, self.engine.scheduler
        totals, profile = scheduler.totals, engine.profile
        yield gauge("requests_running", "requests with a row on an instance", scheduler.placement.running)
        yield gauge("requests_waiting", "requests without one", len(scheduler.requests) - scheduler.placement.running)
        yield gauge("instances", "instances that are up", len(engine.consumer.capacity))
        degrees = GaugeMetricFamily(
            "dilaserve_plan_instances", "instances that are up, by tensor-parallel degree", labels=["degree"]
        )
        sizes = [len(group) for group in engine.plan.groups]
        for degree in engine.degrees:
            degrees.add_metric([str(degree)], sizes.count(degree))
        yield degrees
        last = engine.history[-1].pause if engine.history else None
        yield counter("plan_changes", "changes of the plan", profile.changes)
        yield counter("plan_pause_seconds", "seconds that rows waited for them, the longest of each", profile.paused)
        yield gauge("plan_last_pause_seconds", "that of the last change", last or 0.0)
        yield counter("workers_lost", "workers that died or hung", profile.workers_lost)
        yield gauge(
            "threshold_floor_level", "levels by which load has lowered all thresholds", scheduler.deadlines.floor
        )
        yield counter("steps", "denoising steps", profile.steps)
        yield counter("step_rows", "rows in all steps", profile.rows)
        yield counter("step_seconds", "seconds of all steps, by the workers", profile.seconds)
        yield counter("forward_seconds", "seconds of all steps inside the model", profile.forward)
        yield counter("device_seconds", "seconds of steps that ended requests have taken", totals.device)
        yield counter("wasted_seconds", "those of requests that missed their deadline", totals.wasted)
        yield counter("decide_seconds", "seconds in which the scheduler decided", profile.deciding)
        yield counter("decisions", "times the scheduler decided", profile.decisions)
        yield counter("requests_received", "requests (choices, each counts), refused ones too", totals.received)
        yield by_fate("requests", "requests that have ended, each once, by fate", totals.fates)
        yield by_fate("deadlines", "those with a deadline; met and missed are answered ones", totals.deadlines)
        yield counter("prompt_tokens", "prompt tokens of requests that have ended", totals.prompt_tokens)
        about = "those whose K/V another request had computed"
        yield counter("prefix_cached_tokens", about, totals.cached_prompt_tokens)
        spent = sum(bank.spent for bank in scheduler.deadlines.ledger.banks.values())
        served = sum(bank.served for bank in scheduler.deadlines.ledger.banks.values())
        yield gauge("accuracy_drop", "mean drop that the banks have counted, in points", spent / max(1, served))


def gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"dilaserve_{name}", about, value=value)


def counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"dilaserve_{name}", about, value=value)


def by_fate(name: str, about: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"dilaserve_{name}", about, labels=["fate"])
    for fate, count in counts.items():
        family.add_metric([fate], count)
    return family


def text(engine: Engine) -> bytes:
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return generate_latest(registry)
