"""Everything that watches one server, in one place: metrics, the log of requests, its last minutes."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric

from dilaserve.config import Config
from dilaserve.engine.engine import Engine
from dilaserve.engine.observer import Observer
from dilaserve.server.history import History
from dilaserve.server.http_metrics import HttpMetrics
from dilaserve.server.metrics import EngineCollector
from dilaserve.server.request_log import RequestLog
from dilaserve.server.request_metrics import RequestMetrics
from dilaserve.server.tracing import Tracing, exporter_to
from dilaserve.server.vllm_metrics import VllmCollector


class Telemetry:
    """Watches the engine until it is closed."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine = engine
        self.requests, self.http = RequestMetrics(engine.classes), HttpMetrics()
        self.counts = EngineCollector(engine)
        self.registry = CollectorRegistry()
        self.registry.register(self.counts)
        if config.server.vllm_metrics == "on":
            self.registry.register(VllmCollector(self.ours, engine.model.name))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.history = History(engine)
        endpoint = config.server.otlp_traces_endpoint
        self.tracing = Tracing(engine, exporter_to(endpoint)) if endpoint else None
        log = RequestLog(config.server.log_format == "json")
        self.observers: list[Observer] = [self.requests, self.history, log]
        self.observers += [self.tracing] if self.tracing else []
        engine.observers.extend(self.observers)
        self.history.start()

    def ours(self) -> Iterator[Metric]:
        yield from self.counts.collect()
        yield from self.requests.registry.collect()

    def text(self) -> bytes:
        """What Prometheus reads."""
        return b"".join(map(generate_latest, (self.registry, self.requests.registry, self.http.registry)))

    def close(self) -> None:
        self.history.close()
        for observer in self.observers:
            self.engine.observers.remove(observer)
        if self.tracing:
            self.tracing.close()
