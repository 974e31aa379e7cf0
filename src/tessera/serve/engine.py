"""The engine as a library, in this process, with the calls that users of SGLang's and vLLM's engines know.

with tessera.Engine(model_path="abacus-hybrid") as engine:
    engine.generate("12 + 7 =", {"temperature": 0, "max_new_tokens": 8})["text"]
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from tessera.core.config import Config, current, layered
from tessera.core.errors import ConfigError, Conflict
from tessera.core.messages import Flush
from tessera.models.load import Progress
from tessera.run.core import prepared_core
from tessera.run.startup import prepare
from tessera.serve import profile
from tessera.serve.assets import make_reader
from tessera.serve.calls import Calls
from tessera.serve.local import LocalEngine, wait_for

SamplingParams = dict[str, Any]

UNLIMITED = 1 << 30  # requests that may wait: who calls a library waits for his own
log = logging.getLogger(__name__)


class Engine:
    """Serves one model inside this process. `flags` are those of the command line, in any spelling.

    Answers have the form of SGLang's `/generate`: `{"text", "output_ids", "meta_info"}`. Many threads and event loops
    may use one engine at the same time. It has threads of its own, so `generate` may be called inside a running event
    loop as well. Raises `ConfigError` with every conflict, `ModelError` when the model cannot be found, read or served.
    """

    def __init__(self, model_path: str, *, progress: Progress | None = None, **flags: object) -> None:
        asked = layered({"max_queued_requests": UNLIMITED}, {"model_path": model_path, **flags})
        prepared = prepare(asked, current())
        self.config = config = prepared.resolved.config
        _refuse_replicas(config)
        logging.getLogger("tessera").setLevel(config.logging.level.upper())
        for decision in prepared.resolved.decisions:
            log.info("%s", decision)
        reader = make_reader(config, prepared.folder, prepared.spec.vocab_size)
        self.tokenizer = reader.tokenizer
        self._local = LocalEngine(lambda sink: prepared_core(prepared, sink, progress), config.serving.watchdog_timeout)
        self._calls = Calls(self._local, reader, config.serving.stream_interval)
        # It ends when the interpreter does, too, and when nobody holds the engine or an iterator of it any more.
        weakref.finalize(self._calls, self._local.close)

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        return_logprob: bool | list[bool] = False,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """Answers one prompt with a dict; a list of prompts, or several choices (`n`), with a list of dicts.

        `fields`: further fields of `/generate`, such as `logprob_start_len`, `top_logprobs_num`, `token_ids_logprob`,
        `return_text_in_logprobs`, `priority`. Of a list of prompts each may have its own value. `stream`: an iterator
        of dicts instead, each with the whole text so far, and "index" where there are several. Raises `RequestError`
        for what is asked wrongly, `PeerError` when the engine has failed or is closed.
        """
        body = _body(prompt, sampling_params, input_ids, return_logprob, stream, fields)
        return self._calls.iterate(body) if stream else wait_for(self._calls.answer(body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        return_logprob: bool | list[bool] = False,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """`generate` for an event loop: the answer, or with `stream` an asynchronous iterator.

        A task that is cancelled, and an iterator that is closed, end what they asked for.
        """
        body = _body(prompt, sampling_params, input_ids, return_logprob, stream, fields)
        return self._calls.aiterate(body) if stream else await asyncio.wrap_future(self._calls.answer(body))

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of messages with "role" and "content", by the model's chat template: `input_ids` of `generate`.

        Raises `RequestError` that names what is wrong.
        """
        return self._calls.conversation(messages)

    @property
    def info(self) -> dict[str, object]:
        """The resolved configuration, the decisions taken on the way, and what the model is."""
        return self._local.core.info()

    def flush_cache(self) -> None:
        """Empties the prefix cache."""
        self._local.core.post(Flush())

    def start_profile(self, **fields: Any) -> dict[str, Any]:
        """Starts a profile of all ranks. `fields`: those of `/start_profile`, such as `output_dir` and `num_steps`.

        Raises `RequestError` that says why it cannot.
        """
        folder = self.config.logging.profiles
        return wait_for(self._local.submit(lambda: profile.start(self._local.client, fields, folder)))

    def stop_profile(self) -> dict[str, Any]:
        """Ends the profile; the answer names the traces, which are written then."""
        return wait_for(self._local.submit(lambda: profile.end(self._local.client)))

    def close(self) -> None:
        """Ends the engine and waits for it: what runs is aborted. May be called again."""
        self._local.close()

    shutdown = close  # SGLang's name

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_replicas(config: Config) -> None:
    """Several engines behind one front are what a server is."""
    if config.mesh.replicas > 1:
        flags = (f"--dp-size {config.mesh.replicas}", "no --enable-dp-attention")
        remedy = "Give --enable-dp-attention, use `tessera serve`, or make as many engines yourself."
        raise ConfigError([Conflict(flags, "an Engine in your process is one replica", remedy)])


def _body(prompt: Any, params: Any, ids: Any, logprob: Any, stream: bool, fields: dict[str, Any]) -> dict[str, Any]:
    """A body of `/generate`. None is "not given"; tuples are lists here."""
    known = {"text": prompt, "sampling_params": params, "input_ids": ids, "return_logprob": logprob, "stream": stream}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in {**known, **fields}.items()}
