"""Prometheus metrics of the router: for each server what it was asked, how that ended, and how long it took."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tessera.serve.metrics import TTFT, WHOLE

PREFIX = "tessera:router_"
SERVER = ("server", "role")


class Metrics:
    """All metrics, in a registry of their own. Outcomes: ok, refused (4xx), failed, timeout, cancelled."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            PREFIX + "server_requests", "Requests sent to a server.", (*SERVER, "outcome"), registry=registry
        )
        self.in_flight = Gauge(PREFIX + "server_in_flight", "Prompts that a server has now.", SERVER, registry=registry)
        self.up = Gauge(PREFIX + "server_up", "1 while a server takes requests.", SERVER, registry=registry)
        self.first = Histogram(
            PREFIX + "server_first_byte_seconds", "Until a server's answer begins.", SERVER, buckets=TTFT,
            registry=registry,
        )  # fmt: skip
        self.whole = Histogram(
            PREFIX + "server_seconds", "Until a server's answer has ended.", SERVER, buckets=WHOLE, registry=registry
        )
        self.answers = Counter(
            PREFIX + "requests", "Requests of clients by the status of the answer.", ("status",), registry=registry
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self.registry)
