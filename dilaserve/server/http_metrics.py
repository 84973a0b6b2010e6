"""HTTP requests for Prometheus, by route and status."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from dilaserve.server.request_metrics import SECONDS


class HttpMetrics:
    """`registry` holds what has been counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        about = "HTTP requests by route, method and status; 499: the client left"
        labels = ("route", "method", "status")
        self.requests = Counter("dilaserve_http_requests", about, labels, registry=self.registry)
        about = "Seconds from the head of an HTTP request to the end of its answer"
        self.seconds = Histogram(
            "dilaserve_http_request_duration_seconds", about, ["route"], buckets=SECONDS, registry=self.registry
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `route` is its pattern, so that labels are few."""
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
