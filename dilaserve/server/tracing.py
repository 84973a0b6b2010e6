"""OpenTelemetry spans of requests: how long each waited, what steps it took, and when its text came (extra `otel`).

One span a request, in the trace of the client's `traceparent`, with children `queue`, `refresh` and `reuse` for each
run of such steps, and `stream` from the first tokens on.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from dilaserve import __version__
from dilaserve.engine.engine import Engine
from dilaserve.engine.observer import Ended
from dilaserve.engine.request_views import ended as recently_ended
from dilaserve.errors import ConfigError
from dilaserve.server.request_log import fields
from dilaserve.types import Request, TimedStep

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

NANOSECONDS = 1e9
KEPT = 60.0  # seconds for which the trace of a request is known after its HTTP request: the engine may end it later
CARRIED = ("traceparent", "tracestate")  # headers
NAMES = {"prompt_tokens": "gen_ai.usage.input_tokens", "tokens": "gen_ai.usage.output_tokens"}  # of OpenTelemetry


class Part(NamedTuple):
    """A span below that of a request; instants by the engine's clock."""

    name: str
    began_at: float
    ended_at: float
    attributes: dict[str, Any]


class Tracing:
    """An observer of requests. `parents`: the trace that each belongs to, by id."""

    def __init__(self, engine: Engine, exporter: "SpanExporter") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.engine = engine
        self.provider = provider(exporter, engine.model.name)
        self.tracer = self.provider.get_tracer("dilaserve", __version__)
        self.propagator = TraceContextTextMapPropagator()
        self.parents: dict[str, Context] = {}

    def begin(self, ids: Iterable[str], headers: Mapping[str, str]) -> None:
        """Requests of these ids belong to the trace that the headers name, or to a new one."""
        context = self.propagator.extract({name: headers[name] for name in CARRIED if name in headers})
        self.parents.update(dict.fromkeys(ids, context))

    def answered(self, ids: Iterable[str]) -> None:
        """The HTTP request is over; some of these may never have been requests of the engine."""
        self.engine.loop.call_later(KEPT, self.forget, ids)

    def forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            self.parents.pop(id, None)

    def emitted(self, request: Request, tokens: int, since: float | None, now: float) -> None:
        """Spans are made at the end."""

    def ended(self, ended: Ended) -> None:
        from opentelemetry import trace

        offset, request = time.time() - self.engine.loop.time(), ended.request
        named = {NAMES.get(name, f"dilaserve.{name}"): value for name, value in fields(ended).items()}

        def instant(at: float) -> int:
            return round((at + offset) * NANOSECONDS)

        root = self.tracer.start_span(
            f"dilaserve {ended.fate}",
            context=self.parents.pop(request.id, None),
            kind=trace.SpanKind.SERVER,
            attributes=named,
            start_time=instant(request.arrived_at),
        )
        if ended.fate == "failed":
            root.set_status(trace.StatusCode.ERROR, ended.reason)
        inside = trace.set_span_in_context(root)
        for part in parts(ended, steps_of(self.engine, request.id)):
            began_at = instant(part.began_at)
            span = self.tracer.start_span(part.name, inside, start_time=began_at, attributes=part.attributes)
            span.end(instant(part.ended_at))
        root.end(instant(ended.ended_at))

    def close(self) -> None:
        """Send what is left; blocks for some seconds where nobody takes it."""
        self.provider.shutdown()


def steps_of(engine: Engine, id: str) -> tuple[TimedStep, ...]:
    """The last steps of a request that has just ended."""
    return next((view.timeline for view in recently_ended(engine.scheduler) if view.id == id), ())


def parts(ended: Ended, steps: Sequence[TimedStep]) -> Iterator[Part]:
    """What the time of a request consists of; steps of one kind in a row are one part."""
    arrived, usage = ended.request.arrived_at, ended.usage
    if usage:
        yield Part("queue", arrived, arrived + usage.queued, {})
    for kind, run in groupby(steps, key=lambda step: step.kind):
        alike = list(run)
        last = alike[-1]
        yield Part(kind, alike[0].began_at, last.began_at + last.seconds, {"dilaserve.steps": len(alike)})
    if ended.first_at is not None:
        yield Part("stream", ended.first_at, ended.ended_at, {NAMES["tokens"]: ended.tokens})


def provider(exporter: "SpanExporter", model: str) -> "TracerProvider":
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    about = {"service.name": "dilaserve", "service.version": __version__, "gen_ai.request.model": model}
    made = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter))
    return made


def exporter_to(endpoint: str) -> "SpanExporter":
    """Sends spans as OTLP over HTTP. Raises `ConfigError` where the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs the extra otel: pip install 'dilaserve[otel]' ({error})",
            param="otlp_traces_endpoint",
        ) from error
    return OTLPSpanExporter(endpoint=endpoint)
