"""Shared by the tests of serving: a byte tokenizer, and the app over a fake engine inside one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.fake_engine import FakeEngine
from tessera.core.messages import Ready
from tessera.serve.app import App
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


def byte_tokenizer() -> Tokenizer:
    """Byte-level, without merges: id = byte; then three special tokens."""
    inner = Tokenizer(models.BPE(vocab=dict(BYTE_OF_LETTER), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return inner


class World:
    """App, fake engine, and what they share."""

    def __init__(self, delay: float = 0.0, api_key: str | None = None, silence: float = 300.0, **limits: int) -> None:
        self.engine = FakeEngine(lambda message: self.client.deliver(message), delay)
        self.client = EngineClient(self.engine.post, limits.pop("max_open", 1024), silence)
        tokenizer = Text(byte_tokenizer())
        reader = Reader(
            Limits(CONTEXT, tokenizer.size, **limits),
            tokenizer,
            ChatTemplate(TEMPLATE, {"eos_token": "<|im_end|>"}),
            seed=0,
        )
        options = Options("some/path", "tiny", api_key, watchdog_timeout=silence, info={"config": {"tp_size": 1}})
        self.server = Server(self.client, reader, options, Metrics("tiny", 16))
        self.client._on_report = self.server.metrics.step
        self.app = App(self.server)
        self.paused = False

    async def run_engine(self) -> None:
        self.client.deliver(Ready({}))
        self.server.warm = True
        while True:
            if not self.paused:
                self.engine.turn()
            await asyncio.sleep(self.engine.delay)


@contextlib.asynccontextmanager
async def world(**options: object) -> AsyncIterator[tuple[World, httpx.AsyncClient]]:
    """The app with its engine running, and a client for it."""
    made = World(**options)  # type: ignore[arg-type]
    task = asyncio.create_task(made.run_engine())
    transport = httpx.ASGITransport(app=made.app)  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://tessera") as http:
            await asyncio.sleep(0)
            yield made, http
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
