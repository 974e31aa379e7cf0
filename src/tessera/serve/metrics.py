"""Prometheus metrics, named as SGLang names them but under our own prefix. Fed by step reports and by requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tessera.core.messages import FinishReason, HandoverTimes, StepReport
from tessera.serve.answer import Delta, Usage

PREFIX = "tessera:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.6, 1, 2, 4, 8, 15, 30, 60, 120)
BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 1, 2, 5)
WHOLE = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 10, 20, 40, 60, 120, 300, 600, 1200)
STEP = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 10)
GAUGES = {
    "num_running_reqs": "Sequences that run.",
    "num_queue_reqs": "Requests that wait.",
    "num_used_tokens": "Tokens of KV cache that sequences hold.",
    "token_usage": "Share of the KV pool that sequences hold.",
    "slot_usage": "Share of the recurrent-state slots in use.",
    "num_cached_pages": "Pages that only the prefix cache holds.",
    "num_meeting_reqs": "Requests that wait for the other server of a hand-over, or at decode for memory.",
    "num_transfer_reqs": "Prompts that are being written to or from this server.",
}
SPEED = "GB/s at which the last prompt was written."
HANDOVER = {
    "meeting": "Until decode asks for the prompt; at decode until prefill is met.",
    "queue": "From then until its first chunk is planned; at decode until memory is set aside for it.",
    "waiting": "At decode: from asking for a prompt until it is there.",
    "prefill": "At prefill: from when the first chunk is planned until the last one is computed.",
    "transfer": "From then until the last byte is written.",
}
HIT_RATE = "Share of all prompt tokens so far that came from the prefix cache."
COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests.",
    "generation_tokens": "Tokens generated.",
    "cached_tokens": "Prompt tokens that came from the prefix cache.",
    "num_preemptions": "Sequences put back because memory ran out.",
    "handover_bytes": "Bytes of prompts that were handed over.",
}


class Metrics:
    """All metrics of one server, in a registry of their own. `page_size`: tokens of a page, for the token gauges.

    `num_dp`: data-parallel ranks or replicas; where there are several, the gauges of each have its number as a label.
    """

    def __init__(self, model: str, page_size: int = 1, num_dp: int = 1) -> None:
        self.registry = CollectorRegistry()
        self.page_size = page_size
        names, registry = ["model_name"], self.registry
        self._several = num_dp > 1
        ranks = [*names, "dp_rank"] if self._several else names
        self._gauges = {n: Gauge(PREFIX + n, text, ranks, registry=registry) for n, text in GAUGES.items()}
        self._hits = Gauge(PREFIX + "cache_hit_rate", HIT_RATE, names, registry=registry).labels(model)
        self._counters = {
            n: Counter(PREFIX + n, text, names, registry=registry).labels(model) for n, text in COUNTERS.items()
        }
        self._ends = Counter(
            PREFIX + "num_requests", "Requests by outcome.", ["model_name", "outcome"], registry=self.registry
        )
        self._steps = Histogram(
            PREFIX + "step_time_seconds",
            "Time of a step.",
            ["model_name", "kind"],
            buckets=STEP,
            registry=self.registry,
        )
        self._model = model
        self.first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT)
        self.between = self._histogram("inter_token_latency_seconds", "Between tokens of a choice.", BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._handover = {n: self._histogram(f"handover_{n}_seconds", text, TTFT) for n, text in HANDOVER.items()}
        self._speed = Gauge(PREFIX + "kv_transfer_speed_gb_s", SPEED, names, registry=registry).labels(model)
        self._prompt = self._cached = 0

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
        labelled: Histogram = made.labels(self._model)
        return labelled

    def step(self, report: StepReport) -> None:
        """Numbers of one step."""
        held = report.num_pages_used - report.num_cached_pages
        values = {
            "num_running_reqs": report.num_running,
            "num_queue_reqs": report.num_queued,
            "num_used_tokens": held * self.page_size,
            "token_usage": held / max(report.num_pages, 1),
            "slot_usage": report.num_slots_used / max(report.num_slots, 1),
            "num_cached_pages": report.num_cached_pages,
            "num_meeting_reqs": report.num_meeting,
            "num_transfer_reqs": report.num_leases,
        }
        labels = [self._model, str(report.dp_rank)] if self._several else [self._model]
        for name, value in values.items():
            self._gauges[name].labels(*labels).set(value)
        self._counters["num_preemptions"].inc(report.num_preempted)
        if report.seconds and report.busiest:  # an idle engine reports too, and each DP rank of a step
            self._steps.labels(self._model, report.label).observe(report.seconds)

    def ended(self, outcome: str, usage: Iterable[Usage]) -> None:
        """Counts a request that has ended."""
        self._ends.labels(self._model, outcome).inc()
        for one in usage:
            self._counters["prompt_tokens"].inc(one.num_prompt)
            self._counters["cached_tokens"].inc(one.num_cached)
            self._counters["generation_tokens"].inc(one.num_generated)
            if one.handed is not None:
                self._handed(one.handed)
            self._prompt += one.num_prompt
            self._cached += one.num_cached
        self._hits.set(self._cached / max(self._prompt, 1))

    def _handed(self, times: HandoverTimes) -> None:
        for name, histogram in self._handover.items():
            if (seconds := getattr(times, name)) is not None:
                histogram.observe(seconds)
        self._counters["handover_bytes"].inc(times.num_bytes)
        if times.writing > 0:
            self._speed.set(times.num_bytes / times.writing / 1e9)

    def text(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self.registry)


@dataclass(slots=True)
class Track:
    """One request's times."""

    metrics: Metrics
    began: float = field(default_factory=time.monotonic)
    first: dict[int, float] = field(default_factory=dict)  # when the first token of an item came
    last: dict[tuple[int, int], float] = field(default_factory=dict)
    finishes: set[FinishReason] = field(default_factory=set)

    def observe(self, delta: Delta) -> None:
        """Something came for a choice."""
        now = time.monotonic()
        key = (delta.item, delta.choice)
        if delta.tokens:
            if key in self.last:
                each = (now - self.last[key]) / len(delta.tokens)
                for _ in delta.tokens:
                    self.metrics.between.observe(each)
            elif not self.last:
                self.metrics.first.observe(now - self.began)
            self.last[key] = now
            self.first.setdefault(delta.item, now)
        if delta.finish is not None:
            self.finishes.add(delta.finish)

    @property
    def outcome(self) -> str:
        """How the request ended: the worst of its choices."""
        return next((r for r in ("error", "abort", "length") if r in self.finishes), "stop")

    def end(self, outcome: str, usage: Iterable[Usage]) -> None:
        """The request is over."""
        self.metrics.whole.observe(time.monotonic() - self.began)
        self.metrics.ended(outcome, usage)
