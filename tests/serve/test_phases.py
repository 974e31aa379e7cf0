"""Where the time of a hand-over went: phases one after the other, as spans of one trace over all three servers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.support import in_loop
from tessera.core.messages import HandoverTimes, Outbound, Stop
from tessera.run.core import EngineCore, prepared_core
from tessera.run.startup import prepare
from tessera.serve.app import make_app
from tessera.serve.client import EngineClient
from tessera.serve.listener import Listener, bind, url
from tessera.serve.metrics import Metrics
from tessera.serve.phases import BYTES, SECONDS, phases
from tessera.serve.router import app as router_app
from tessera.serve.router.router import Options as RouterOptions
from tessera.serve.router.router import Router
from tessera.serve.router.servers import Address, Role
from tessera.serve.schema import Limits, Reader
from tessera.serve.server import Options, Server
from tessera.serve.trace import Tracing
from tessera.serve.trace_otel import Recorded
from waits import until

TRACE = "ab" * 16
PARENT = {"traceparent": f"00-{TRACE}-{'cd' * 8}-01"}
PREFILL = ["bootstrap", "queue", "prefill", "transfer"]
DECODE = ["bootstrap", "decode queue", "transfer wait", "first token"]
SECONDS_EACH = st.floats(0, 100)


@given(
    st.builds(
        HandoverTimes,
        meeting=SECONDS_EACH,
        queue=SECONDS_EACH,
        prefill=SECONDS_EACH,
        transfer=SECONDS_EACH,
        waiting=st.none() | SECONDS_EACH,
        num_bytes=st.integers(0, 1 << 40),
        ended=st.floats(0, 1e6),
    ),
    st.none() | st.floats(0, 10),
)
def test_phases_follow_one_another_and_end_when_the_prompt_was_there(times: HandoverTimes, later: float | None) -> None:
    found = list(phases(times, None if later is None else times.ended + later))
    names = PREFILL if times.waiting is None else DECODE[: 3 + (later is not None)]
    assert [phase.name for phase in found] == names
    assert all(phase.begin <= phase.end for phase in found)
    for one, following in pairwise(found):
        assert one.end == pytest.approx(following.begin, abs=1e-6)
    last = found[3 if times.waiting is None else 2]
    assert last.end == pytest.approx(times.ended, abs=1e-6)
    assert last.attributes[BYTES] == times.num_bytes


class Real:
    """A server with an engine, in this process."""

    def __init__(self, role: Role, tracing: Tracing) -> None:
        loop = asyncio.get_running_loop()

        def sink(message: Outbound) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.client.deliver, message)

        flags: dict[str, Any] = {"model_path": "abacus-mla", "device": "cpu", "dtype": "float32", "page_size": 16}
        flags |= {"disaggregation_mode": role, "disaggregation_bootstrap_port": 0, "max_total_tokens": 4096}
        made = prepare({**flags, "chunked_prefill_size": 32}, {})
        config = made.resolved.config
        self._tracing = tracing
        self.core: EngineCore = prepared_core(made, sink)
        self.client = EngineClient([self.core.post], silence=60.0)
        reader = Reader(Limits.of(config, made.spec.vocab_size), None, None, seed=0)
        server = Server(self.client, reader, Options("m", "m", tracing=tracing), Metrics("m", 16))
        self._listening = bind("127.0.0.1", 0)
        self._listener = Listener(make_app(server), self._listening, access_log=False)
        self._thread = threading.Thread(target=self.core.run)
        self._thread.start()
        self.client.replicas[0].warm.set()
        assert self.core.handover is not None
        bootstrap = self.core.handover.bootstrap
        self.address = Address(url(self._listening), role, bootstrap.port if bootstrap is not None else None)

    async def close(self) -> None:
        self.core.post(Stop())
        await asyncio.to_thread(self._thread.join, 30)
        await self._listener.close()
        self._listening.close()
        await asyncio.to_thread(self._tracing.close)


async def ask(tracings: dict[str, Tracing], body: dict[str, Any]) -> httpx.Response:
    """The answer of a router before a prefill and a decode server."""
    servers = [Real("prefill", tracings["prefill"]), Real("decode", tracings["decode"])]
    router = Router(RouterOptions(tuple(server.address for server in servers), interval=0.05), tracings["router"])
    listening = bind("127.0.0.1", 0)
    listener = Listener(router_app.make_app(router), listening, access_log=False)
    watching = asyncio.create_task(router.watch())
    try:
        async with httpx.AsyncClient(base_url=url(listening), timeout=30, trust_env=False) as http:
            await until(lambda: router.trouble is None)
            return await http.post("/generate", json=body, headers=PARENT)
    finally:
        await listener.close()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await router.close()
        for server in servers:
            await server.close()


def in_trace(span: ReadableSpan) -> bool:
    """Not one of the router's own questions to servers."""
    return format(span.context.trace_id, "032x") == TRACE


def children(spans: list[ReadableSpan]) -> Iterator[ReadableSpan]:
    """The phases under a server's own span, which is the only other one."""
    (own,) = [span for span in spans if span.name == "POST /generate"]
    for span in spans:
        if span is not own:
            assert span.parent is not None
            assert span.parent.span_id == own.context.span_id
            assert own.start_time - 5_000_000 <= span.start_time <= span.end_time <= own.end_time + 5_000_000, span.name
            yield span


@in_loop
async def test_router_prefill_and_decode_tell_their_phases_in_one_trace() -> None:
    kept = {name: InMemorySpanExporter() for name in ("router", "prefill", "decode")}
    tracings = {name: Recorded("", name, out) for name, out in kept.items()}
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    answer = await ask(dict(tracings), {"input_ids": list(range(5, 75)), "sampling_params": params})
    assert answer.status_code == 200, answer.text
    spans = {name: [span for span in out.get_finished_spans() if in_trace(span)] for name, out in kept.items()}
    assert {span.name for span in spans["router"]} == {"POST /generate", "prefill", "decode"}
    for role, names in (("prefill", PREFILL), ("decode", DECODE)):
        found = list(children(spans[role]))
        assert [span.name for span in found] == names
        for one, following in pairwise(found):
            assert abs(one.end_time - following.start_time) < 1_000_000, "a gap"
    took = {span.name: span.end_time - span.start_time for span in spans["prefill"]}
    assert took["prefill"] > 1_000_000, "three chunks, of which two are planned at once"
    moved = {span.name: dict(span.attributes or {}) for found in spans.values() for span in found}
    assert moved["transfer"][BYTES] == moved["transfer wait"][BYTES] > 1000
    assert moved["transfer"][SECONDS] > 0


@in_loop
async def test_without_tracing_nothing_is_recorded_and_the_answer_is_the_same() -> None:
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    plain: dict[str, Tracing] = {name: Tracing() for name in ("router", "prefill", "decode")}
    answer = await ask(plain, {"input_ids": list(range(5, 75)), "sampling_params": params, "rid": "named"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["traceparent"].split("-")[1] == TRACE
