"""Spans: one trace over router, prefill and decode, parents as they were asked; servers honour the header, too."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import calls
from serve.processes import fake_server, model_folder
from serve.router.fakes import world
from serve.support import in_loop
from tessera.core.errors import ConfigError
from tessera.serve import trace
from tessera.serve.trace import Tracing, make_tracing
from tessera.serve.trace_otel import GrpcExporter, HttpExporter, Recorded, exporter
from waits import until

PARENT = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}


@in_loop
async def test_the_legs_are_children_of_the_routers_span() -> None:
    kept = InMemorySpanExporter()
    tracing = Recorded("", "tessera-router", kept)
    async with world(prefill=1, decode=1, tracing=tracing) as made:
        answer = await made.http.post("/generate", json={"text": "x"}, headers=PARENT)
        got = {fake.role: fake.seen[0][2]["traceparent"].split("-") for fake in made.fakes}
        await until(made.idle)
    await asyncio.to_thread(tracing._provider.force_flush)
    spans = {span.name: span for span in kept.get_finished_spans()}
    assert spans.keys() == {"POST /generate", "prefill", "decode"}
    own = spans["POST /generate"]
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {"ab" * 16}
    assert format(own.parent.span_id, "016x") == "cd" * 8
    for role in ("prefill", "decode"):
        assert spans[role].parent.span_id == own.context.span_id
        assert got[role][2] == format(spans[role].context.span_id, "016x"), "the server's parent is its leg"
        assert spans[role].attributes["http.response.status_code"] == 200
    assert answer.headers["traceparent"].split("-")[2] == format(own.context.span_id, "016x")


class Collector(BaseHTTPRequestHandler):
    """Takes spans over HTTP."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, self.headers.get("content-encoding"), body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


def test_a_server_sends_its_spans_to_a_collector_and_logs_the_trace_id(tmp_path: Path) -> None:
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    collector.got = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        where = f"http://127.0.0.1:{collector.server_address[1]}"
        with fake_server(
            model_folder(tmp_path), enable_trace=True, otlp_traces_endpoint=where, log_requests=True
        ) as server:
            url = server.ready()
            found = calls.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=PARENT)
            assert found.status_code == 200
            server.wait_for(rf"Trace: POST /v1/completions trace={'ab' * 16}")
            server.process.terminate()
            assert server.code() == 0
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    ((path, _, body),) = collector.got  # type: ignore[attr-defined]
    sent = ExportTraceServiceRequest.FromString(body).resource_spans[0]
    assert path == "/v1/traces"
    assert "tessera" in str(sent.resource.attributes)
    (span,) = sent.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("POST /v1/completions", "ab" * 16, "cd" * 8)


def test_off_by_default_and_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_tracing(False, "x", "y")) is Tracing

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(trace, "import_module", absent)
    with pytest.raises(ConfigError, match="OpenTelemetry is not installed"):
        make_tracing(True, "localhost:4317", "y")


def test_endpoints() -> None:
    made = [exporter(where) for where in ("localhost:4317", "http://a:4318", "http://a/x/y")]
    assert isinstance(made[0], GrpcExporter)
    assert [one._endpoint for one in made[1:]] == ["http://a:4318/v1/traces", "http://a/x/y"]
    assert isinstance(made[1], HttpExporter)
    for one in made:
        one.shutdown()
