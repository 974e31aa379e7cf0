"""Shared by the tests of serving: a byte tokenizer, and the app over a fake engine inside one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, ParamSpec

import httpx
from starlette.types import ASGIApp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.fake_engine import FakeEngine
from tessera.core.messages import Outbound, Ready
from tessera.serve.app import make_app
from tessera.serve.chat import ChatTemplate
from tessera.serve.client import EngineClient
from tessera.serve.metrics import Metrics
from tessera.serve.schema import Limits, Reader
from tessera.serve.server import Options, Server
from tessera.serve.text import BYTE_OF_LETTER
from tessera.serve.text import Tokenizer as Text

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTEXT = 512
P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine, with a deadline a little short of pytest's, so that it says where it waited."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 100))

    return run


def byte_tokenizer() -> Tokenizer:
    """Byte-level, without merges: id = byte; then three special tokens."""
    inner = Tokenizer(models.BPE(vocab=dict(BYTE_OF_LETTER), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return inner


class World:
    """App, fake engine, and what they share."""

    def __init__(
        self,
        delay: float = 0.0,
        api_key: str | None = None,
        silence: float = 300.0,
        stream_interval: int = 1,
        with_tokenizer: bool = True,
        **limits: int,
    ) -> None:
        self.engine = FakeEngine(self._deliver, delay)
        self.client = EngineClient([self.engine.post], limits.pop("max_open", 1024), silence)
        tokenizer = Text(byte_tokenizer())
        reader = Reader(
            Limits(CONTEXT, tokenizer.size, **limits),
            tokenizer if with_tokenizer else None,
            ChatTemplate(TEMPLATE, {"eos_token": "<|im_end|>"}),
            seed=0,
        )
        options = Options("some/path", "tiny", api_key, stream_interval, info={"config": {"tp_size": 1}})
        self.server = Server(self.client, reader, options, Metrics("tiny", 16))
        self.client.on_report = self.server.metrics.step
        self.app = make_app(self.server)
        self.paused = False

    def _deliver(self, message: Outbound) -> None:
        self.client.deliver(message)

    async def run_engine(self) -> None:
        self.client.deliver(Ready({}))
        self.client.replicas[0].warm.set()
        while True:
            if not self.paused:
                self.engine.turn()
            await asyncio.sleep(self.engine.delay)


@contextlib.asynccontextmanager
async def world(**options: object) -> AsyncIterator[tuple[World, httpx.AsyncClient]]:
    """The app with its engine running, and a client for it."""
    made = World(**options)  # type: ignore[arg-type]
    task = asyncio.create_task(made.run_engine())
    transport = httpx.ASGITransport(app=made.app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://tessera") as http:
            await asyncio.sleep(0)
            yield made, http
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], parts[-2:]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, which must be in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return dict(error)


class Visitor:
    """A client at the level of ASGI: sends its body in parts, sees every message of the answer, may leave."""

    def __init__(self, app: ASGIApp, path: str, parts: Iterable[bytes] = (b"",), headers: dict[str, str] | None = None):
        self.got: list[dict[str, Any]] = []
        self.asked = 0
        self.left = asyncio.Event()
        self.reads = asyncio.Event()  # cleared, the answer waits
        self.reads.set()
        self._parts = list(parts)
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        self.asked += 1
        if self._parts:
            return {"type": "http.request", "body": self._parts.pop(0), "more_body": bool(self._parts)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.got.append(dict(message))

    @property
    def status(self) -> int | None:
        """Status of the answer, once it has begun."""
        return self.got[0]["status"] if self.got else None
