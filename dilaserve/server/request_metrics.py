"""Distributions over requests for Prometheus: latencies, tokens, slack; and HTTP requests by route and status."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from dilaserve.engine.observer import Ended
from dilaserve.server.lateness import CAUSES, cause_label
from dilaserve.types import Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SLACK = (-60.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
PER_STEP = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32, 64)
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


class RequestMetrics:
    """An observer of requests; `registry` holds what it has counted since it began to watch."""

    def __init__(self, classes: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.classes = frozenset(classes)
        self.first = self.histogram(
            "time_to_first_token_seconds", "From arrival to the first tokens of an answer", SECONDS
        )
        about = "Seconds between two moments at which tokens of an answer become final, for each token of the later"
        self.between = self.histogram("inter_token_latency_seconds", about, SHORT)
        self.whole = self.histogram("e2e_request_latency_seconds", "From arrival to the end of an answer", SECONDS)
        self.queued = self.histogram("request_queue_time_seconds", "From arrival to the first step", SECONDS)
        self.served = self.histogram("request_inference_time_seconds", "From the first step to the end", SECONDS)
        about = (
            "Seconds of the steps that an answer took part in; the rest of its inference time it waited between steps"
        )
        self.stepping = self.histogram("request_stepping_time_seconds", about, SECONDS)
        about = "Seconds per token of an answer after its first tokens"
        self.per_token = self.histogram("request_time_per_output_token_seconds", about, SHORT)
        self.prompt = self.histogram("request_prompt_tokens", "Prompt tokens of answered requests", TOKENS)
        self.generated = self.histogram("request_generation_tokens", "Tokens of answers", TOKENS)
        self.steps = self.histogram("request_steps", "Denoising steps of an answer", STEPS)
        self.per_step = self.histogram("request_tokens_per_step", "Tokens of an answer per denoising step", PER_STEP)
        self.threshold = self.histogram("request_mean_threshold", "Mean confidence threshold of an answer", THRESHOLDS)
        about = "Seconds from the end of an answer to its deadline; below 0: the answer was late"
        self.slack = self.histogram("deadline_slack_seconds", about, SLACK)
        self.tokens = self.counter("generation_tokens", "Tokens of answers that have become final")
        self.finished = self.counter("finish_reasons", "Answers by why they ended: stop or length", "finish_reason")
        about = "Requests with a deadline that have ended, by class of --slo-class (none: deadline_ms) and fate"
        self.deadlines = self.counter("deadlines_by_class", about, "class", "fate")
        about = "Requests that missed their deadline or were declined, by what took most of the time beyond that alone"
        self.causes = self.counter("deadline_causes", about, "cause")
        for label in CAUSES:
            self.causes.labels(label)
        about = "Times that requests lost their K/V: to other requests, to a change of the plan, or with a worker"
        self.restarts = self.counter("request_restarts", about)

    def histogram(self, name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"dilaserve_{name}", about, labels, buckets=buckets, registry=self.registry)

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"dilaserve_{name}", about, labels, registry=self.registry)

    def emitted(self, request: Request, tokens: int, since: float | None, now: float) -> None:
        self.tokens.inc(tokens)
        if since is None:
            self.first.observe(now - request.arrived_at)
        else:
            self.between.observe((now - since) / tokens)

    def ended(self, ended: Ended) -> None:
        if fate := ended.deadline_fate:
            name = ended.request.slo.name
            self.deadlines.labels(name if name in self.classes else "none", fate).inc()
        usage = ended.usage
        if usage is None:
            return
        self.restarts.inc(usage.restarts)
        if ended.deadline_fate in ("missed", "declined"):
            self.causes.labels(cause_label(usage)).inc()
        if ended.fate != "answered":
            return
        self.finished.labels(ended.reason).inc()
        self.whole.observe(usage.queued + usage.served)
        self.queued.observe(usage.queued)
        self.served.observe(usage.served)
        self.stepping.observe(usage.stepping)
        self.prompt.observe(ended.request.prompt_tokens)
        self.generated.observe(ended.tokens)
        self.steps.observe(usage.steps)
        if usage.steps:
            self.per_step.observe(ended.tokens / usage.steps)
        if usage.mean_threshold is not None:
            self.threshold.observe(usage.mean_threshold)
        if ended.slack is not None:
            self.slack.observe(ended.slack)
        if ended.tokens > 1 and ended.first_at is not None:
            self.per_token.observe((ended.ended_at - ended.first_at) / (ended.tokens - 1))
