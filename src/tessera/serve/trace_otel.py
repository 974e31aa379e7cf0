"""Spans recorded by OpenTelemetry and sent to a collector. Needs the extra `trace`; imported by `trace.py` alone."""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span as Recording
from opentelemetry.trace import SpanKind, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tessera.serve.trace import Span, Tracing

EXPORT_SECONDS = 5  # for the collector to take a batch
CLOSE_MS = 5000
CONTEXT = TraceContextTextMapPropagator()


def exporter(endpoint: str) -> SpanExporter:
    """Over HTTP to a URL (its path /v1/traces unless it has one), over gRPC to HOST:PORT."""
    if "://" not in endpoint:
        return GrpcExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_SECONDS)
    _, _, rest = endpoint.partition("://")
    path = "" if "/" in rest.rstrip("/") else "/v1/traces"
    return HttpExporter(endpoint=endpoint.rstrip("/") + path, timeout=EXPORT_SECONDS)


class Recorded(Tracing):
    """Tracing that records. Batches leave in a thread of their own; a collector that is away costs spans, no more."""

    def __init__(self, endpoint: str, service: str, out: SpanExporter | None = None) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(out or exporter(endpoint)))
        self._tracer = self._provider.get_tracer("tessera")

    def begin(self, name: str, headers: Mapping[str, str]) -> RecordedSpan:
        return RecordedSpan(self._tracer, name, SpanKind.SERVER, CONTEXT.extract(dict(headers), Context()))

    def close(self) -> None:
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()


class RecordedSpan(Span):
    """A span that goes to the collector."""

    def __init__(self, tracer: Tracer, name: str, kind: SpanKind, parent: Context) -> None:
        self._tracer = tracer
        self._span: Recording = tracer.start_span(name, parent, kind)
        self._context = set_span_in_context(self._span, parent)
        self.trace_id = format(self._span.get_span_context().trace_id, "032x")

    @property
    def headers(self) -> dict[str, str]:
        made: dict[str, str] = {}
        CONTEXT.inject(made, self._context)
        return made

    def child(self, name: str) -> RecordedSpan:
        return RecordedSpan(self._tracer, name, SpanKind.CLIENT, self._context)

    def phase(self, name: str, begin: float, end: float, attributes: Mapping[str, float]) -> None:
        epoch = time.time_ns() - time.monotonic_ns()
        first, last = (epoch + int(at * 1e9) for at in (begin, end))
        self._tracer.start_span(name, self._context, attributes=attributes, start_time=first).end(last)

    def end(self, status: int | None = None) -> None:
        """Attributes as OpenTelemetry's conventions for HTTP name them."""
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        else:
            self._span.set_attribute("error.type", "cancelled")
        self._span.end()
