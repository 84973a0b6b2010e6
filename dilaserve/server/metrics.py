"""What Prometheus reads of the engine's own counts: what runs and waits now, steps, plans, K/V memory, accuracy."""

import platform
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from dilaserve import __version__
from dilaserve.engine.engine import Engine
from dilaserve.engine.request_views import thresholds_in_force, under_way
from dilaserve.types import PAGE

PREFIX = "dilaserve_"
MOST_TENANTS = 16  # with a label of their own, those with most requests; the others share the label "other"


class EngineCollector(Collector):
    """Reads the engine whenever it is asked; nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self.about()
        yield from self.requests()
        yield from self.plan()
        yield from self.steps()
        yield from self.memory()
        yield from self.accuracy()

    def about(self) -> Iterator[Metric]:
        engine = self.engine
        build = InfoMetricFamily(PREFIX + "build", "Version of the server, and the model that it serves")
        labels = {"version": __version__, "model": engine.model.name, "python": platform.python_version()}
        build.add_metric([], labels)
        yield build
        yield gauge("ready", "1 while the server takes requests: loaded, not draining, an instance up", engine.ready)
        yield gauge(
            "max_model_len", "Tokens that a prompt and its answer may have together", engine.model.max_model_len
        )

    def requests(self) -> Iterator[Metric]:
        totals, now = self.engine.scheduler.totals, under_way(self.engine.scheduler)
        yield gauge("requests_running", "Requests with a row on an instance", now.running)
        yield gauge("requests_waiting", "Requests that wait for a row", now.waiting)
        yield counter("requests_received", "Requests that came (each choice counts), refused ones too", totals.received)
        yield by_fate("requests", "Requests that have ended, each once, by what became of them", totals.fates)
        about = "Requests with a deadline that have ended; met and missed are answered ones"
        yield by_fate("deadlines", about, totals.deadlines)
        yield counter("prompt_tokens", "Prompt tokens of requests that have ended", totals.prompt_tokens)
        about = "Prompt tokens of ended requests whose K/V another request had computed"
        yield counter("prefix_cached_tokens", about, totals.cached_prompt_tokens)

    def plan(self) -> Iterator[Metric]:
        engine, profile = self.engine, self.engine.profile
        yield gauge("devices", "Devices that the server was started with", len(engine.devices))
        yield gauge("workers", "Worker processes that are up", len(engine.consumer.pools))
        yield gauge("instances", "Instances that are up", len(engine.consumer.capacity))
        degrees = GaugeMetricFamily(
            PREFIX + "plan_instances", "Instances that are up, by tensor-parallel degree", labels=["degree"]
        )
        sizes = [len(group) for group in engine.plan.groups]
        for degree in engine.degrees:
            degrees.add_metric([str(degree)], sizes.count(degree))
        yield degrees
        last = engine.history[-1].pause if engine.history else None
        yield counter("plan_changes", "Changes of the plan", profile.changes)
        about = "Seconds that rows waited for changes of the plan, the longest wait of each change"
        yield counter("plan_pause_seconds", about, profile.paused)
        yield gauge("plan_last_pause_seconds", "Longest wait of a row for the last change of the plan", last or 0.0)
        yield counter("workers_lost", "Workers that died or hung", profile.workers_lost)

    def steps(self) -> Iterator[Metric]:
        scheduler, profile = self.engine.scheduler, self.engine.profile
        totals = scheduler.totals
        yield counter("steps", "Denoising steps of batches", profile.steps)
        kinds = CounterMetricFamily(
            PREFIX + "steps_by_kind",
            "Denoising steps: refresh, if any row of the batch recomputes K/V that later steps reuse, else reuse",
            labels=["kind"],
        )
        for kind, count in totals.steps.items():
            kinds.add_metric([kind], count)
        yield kinds
        yield counter("step_rows", "Rows in all steps; divided by steps: the mean batch size", profile.rows)
        about = "Tokens unmasked in all steps; divided by step_rows: tokens per step of a row"
        yield counter("unmasked_tokens", about, totals.unmasked)
        yield counter("step_seconds", "Seconds of all steps, by the workers' clocks", profile.seconds)
        yield counter("forward_seconds", "Seconds of all steps inside the model", profile.forward)
        errors = [pace.learner.errors for pace in scheduler.estimates.paces.values()]
        about = "Sum over steps of |ln(actual / predicted seconds)|; divided by steps: the cost model's mean error"
        yield counter("step_time_error", about, sum(errors))
        yield counter("device_seconds", "Seconds of steps that ended requests have taken", totals.device)
        about = "The part of device_seconds on requests that missed their deadline"
        yield counter("wasted_seconds", about, totals.wasted)
        yield counter("decide_seconds", "Seconds in which the scheduler decided", profile.deciding)
        yield counter("decisions", "Times the scheduler decided", profile.decisions)

    def memory(self) -> Iterator[Metric]:
        """K/V of all instances together, in tokens."""
        pools = [replica.pages for replica in self.engine.scheduler.placement.all_replicas()]
        capacity, used = sum(pool.capacity for pool in pools), sum(pool.capacity - pool.unused for pool in pools)
        states = {"used": used, "kept": sum(sum(pool.kept.values()) for pool in pools), "capacity": capacity}
        tokens = GaugeMetricFamily(
            PREFIX + "kv_cache_tokens",
            "K/V memory of all instances in tokens: used by rows, kept for the reuse of prompts, capacity",
            labels=["state"],
        )
        for state, count in states.items():
            tokens.add_metric([state], count)
        yield tokens
        yield gauge(
            "kv_cache_page_tokens", "Tokens of a page, of which K/V memory and the reuse of prompts consist", PAGE
        )
        yield gauge("kv_cache_pages", "K/V memory of all instances in pages", capacity // PAGE)
        yield gauge(
            "kv_cache_usage_ratio", "K/V memory that rows use, as a share of all (0 to 1)", ratio(used, capacity)
        )

    def accuracy(self) -> Iterator[Metric]:
        """Thresholds in force, and what they are expected to cost."""
        scheduler = self.engine.scheduler
        deadlines = scheduler.deadlines
        about = "Confidence threshold of the rows that go by one, lowest and mean; 1 while there is none"
        thresholds = GaugeMetricFamily(PREFIX + "confidence_threshold", about, labels=["of"])
        in_force = thresholds_in_force(scheduler) or [1.0]
        thresholds.add_metric(["lowest"], min(in_force))
        thresholds.add_metric(["mean"], sum(in_force) / len(in_force))
        yield thresholds
        yield gauge("threshold_floor_level", "Levels by which load has lowered all thresholds", deadlines.floor)
        banks, budget = deadlines.ledger.banks, deadlines.ledger.budget
        spent, served = sum(bank.spent for bank in banks.values()), sum(bank.served for bank in banks.values())
        about = "Mean accuracy drop of all answers that thresholds are expected to have cost, in percentage points"
        yield gauge("accuracy_drop", about, spent / max(1, served))
        if budget is not None:
            yield gauge("accuracy_budget", "Mean accuracy drop in percentage points that a tenant may have", budget)
        tenants = GaugeMetricFamily(
            PREFIX + "tenant_accuracy_drop",
            f"Mean accuracy drop by tenant in points: the {MOST_TENANTS} with most requests, and all others",
            labels=["tenant"],
        )
        for name, drop in drops({name: (bank.spent, bank.served) for name, bank in banks.items()}):
            tenants.add_metric([name], drop)
        yield tenants


def drops(banks: Mapping[str, tuple[float, float]]) -> Iterator[tuple[str, float]]:
    """Mean drop by tenant, of what each has spent and been served; few have a name here."""
    ranked = sorted(banks, key=lambda name: -banks[name][1])
    for name in ranked[:MOST_TENANTS]:
        spent, served = banks[name]
        yield name, spent / max(1, served)
    if rest := [banks[name] for name in ranked[MOST_TENANTS:]]:
        yield "other", sum(spent for spent, _ in rest) / max(1, sum(served for _, served in rest))


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, about, value=value)


def counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, about, value=value)


def by_fate(name: str, about: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, about, labels=["fate"])
    for fate, count in counts.items():
        family.add_metric([fate], count)
    return family


def named(metrics: Iterable[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}
