"""The state that all endpoints share: the engine's client, the request reader, names, and what runs right now."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tessera.core.errors import PeerError, RequestError
from tessera.core.messages import SamplingParams
from tessera.serve.answer import Answering
from tessera.serve.client import EngineClient
from tessera.serve.http import Call, UnavailableError, read_json
from tessera.serve.metrics import Metrics, Track
from tessera.serve.phases import record
from tessera.serve.schema import Item, Reader, Request
from tessera.serve.trace import Span, Tracing

log = logging.getLogger(__name__)
ANY_MODEL = "default"  # SGLang's clients send this where the model does not matter


@dataclass(frozen=True, slots=True)
class Options:
    """What the front process was told. `profiles`: folder of traces for which nobody names one; `info`: the resolved
    configuration, as `/server_info` shows it."""

    model_path: str
    served_model_name: str
    api_key: str | None = None
    stream_interval: int = 1
    log_requests: bool = False
    profiles: str = "/tmp"
    tracing: Tracing = field(default_factory=Tracing)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Server:
    """One model behind HTTP. `draining`: nothing new is taken."""

    client: EngineClient
    reader: Reader
    options: Options
    metrics: Metrics
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    running: dict[str, list[Answering]] = field(default_factory=dict)
    batches: dict[str, set[str]] = field(default_factory=dict)  # ids that run, by that of their batch
    quiet: asyncio.Event = field(default_factory=asyncio.Event)  # nothing runs

    def __post_init__(self) -> None:
        self.quiet.set()

    @property
    def trouble(self) -> str | None:
        """Why the server is not ready, or None."""
        if self.draining and self.client.failure is None:
            return "the server is shutting down"
        return self.client.trouble

    def require_ready(self) -> None:
        """Raises UnavailableError when requests cannot be taken."""
        if (trouble := self.trouble) is not None:
            raise UnavailableError(trouble)

    def require_model(self, name: str | None) -> None:
        """Raises a 404 for a model that is not served."""
        known = (None, "", ANY_MODEL, self.options.served_model_name, self.options.model_path)
        if name not in known:
            message = f"the model {name[:200]!r} is not served here; served: {self.options.served_model_name!r}"
            raise RequestError(message, "model", 404)

    async def body(self, call: Call) -> Any:
        """The body of a call that needs a ready server."""
        self.require_ready()
        return await read_json(call, self.reader.limits.max_body)

    @contextmanager
    def answering(self, span: Span, request: Request, rid: str) -> Iterator[Answering]:
        """Submits a request and keeps account of it: metrics, log, phases in `span`, `/abort_request`, drain."""
        self.require_ready()
        self.require_model(request.model)
        taken = [rid] if rid in self.running or rid in self.batches else []
        taken += [request.batch] if request.batch in self.running else []
        if taken and request.rid is not None:
            raise RequestError(f"rid {taken[0][:100]!r} is in flight already", "rid")
        track = Track(self.metrics)
        outcome = "error"
        answering = Answering(
            self.client, self.reader.tokenizer, request.items, self.options.stream_interval, track.observe
        )
        self._enter(rid, request.batch, answering)
        if self.options.log_requests:
            log.info("Receive: rid=%s, #prompt: %d, params=%s", rid, len(request.items), request.items[0].params)
        try:
            with answering:
                yield answering
            outcome = track.outcome
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "abort"
            raise
        except RequestError:
            outcome = "refused"
            raise
        finally:
            self._leave(rid, request.batch, answering)
            track.end(outcome, answering.usage)
            record(span, answering.usage, track.first)
            if self.options.log_requests:
                log.info("Finish: rid=%s, outcome=%s, usage=%s", rid, outcome, answering.usage)

    def _enter(self, rid: str, batch: str | None, answering: Answering) -> None:
        self.running.setdefault(rid, []).append(answering)
        if batch is not None:
            self.batches.setdefault(batch, set()).add(rid)
        self.quiet.clear()

    def _leave(self, rid: str, batch: str | None, answering: Answering) -> None:
        self.running[rid].remove(answering)
        if not self.running[rid]:
            del self.running[rid]
        if batch is not None:
            self.batches[batch].discard(rid)
            if not self.batches[batch]:
                del self.batches[batch]
        if not self.running:
            self.quiet.set()

    def abort(self, rid: str | None) -> int:
        """Aborts what runs under an id, the whole batch where it is that of a batch, or everything; returns how many
        requests that is. SGLang takes whatever begins with the id, so that "1" ends somebody's "10" as well."""
        rids = list(self.running) if rid is None else [rid, *self.batches.get(rid, ())]
        return sum(answering.abort() for one in rids for answering in self.running.get(one, ()))

    async def probe(self, number: int = 0) -> float:
        """One real generation of one token by an engine; returns its seconds. Raises what went wrong."""
        began = time.monotonic()
        item = Item([0], SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True), dp_rank=number)
        with Answering(self.client, None, [item]) as answering:
            ((answer,),) = await answering.collect()
        if not answer.tokens:
            raise PeerError(f"the engine answered a probe with no token (finish: {answer.finish})")
        return time.monotonic() - began


def new_id(prefix: str) -> str:
    """An id for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
