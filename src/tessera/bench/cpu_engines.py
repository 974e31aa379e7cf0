"""Engines that `bench/cpu.py` compares: each takes prompts and a number of new tokens and says when its tokens came."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from tessera.core.messages import Fatal, Outbound, Outputs, SamplingParams, Stop, Submit
from tessera.run.core import prepared_core
from tessera.run.startup import prepare

PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One round: the tokens of each request, and when each came, in seconds since the start."""

    tokens: list[list[int]]
    times: list[list[float]]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the time until the last of them."""
        return sum(map(len, self.tokens)) / max(t[-1] for t in self.times)

    @property
    def decode_per_s(self) -> float:
        """Tokens that came after every request had its first, over the time that they took."""
        begin, end = max(t[0] for t in self.times), max(t[-1] for t in self.times)
        return sum(time > begin for t in self.times for time in t) / (end - begin)


class Ours:
    """Tessera's engine without the text side, in a thread of its own, with the configuration that a user gets."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        asked = {"model_path": str(folder), "device": "cpu", "dtype": "bfloat16", **flags}
        self._round, self._error = itertools.count(), ""
        self._changed = threading.Condition()
        self._tokens: dict[str, list[int]] = {}
        self._times: dict[str, list[float]] = {}
        self.core = prepared_core(prepare(asked, {}), self._take)
        self._thread = threading.Thread(target=self.core.run, name="tessera-bench")

    def __enter__(self) -> Ours:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.core.post(Stop(1.0))
        self._thread.join(PATIENCE_S)

    def _take(self, message: Outbound) -> None:
        now = time.perf_counter()
        with self._changed:
            if isinstance(message, Outputs):
                for output in message.items:
                    self._tokens[output.request_id] += output.tokens
                    self._times[output.request_id] += [now] * len(output.tokens)
                    self._error = self._error or output.error or ""
            elif isinstance(message, Fatal):
                self._error = message.error
            self._changed.notify_all()

    def __call__(self, prompts: list[list[int]], new: int) -> Measured:
        """Runs all prompts at once."""
        turn = next(self._round)
        names = [f"{turn}-{i}" for i in range(len(prompts))]
        params = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        with self._changed:
            self._tokens, self._times = {name: [] for name in names}, {name: [] for name in names}
            begin = time.perf_counter()
            for name, prompt in zip(names, prompts, strict=True):
                self.core.post(Submit(name, prompt, params))
            self._changed.wait_for(lambda: self._error or all(len(t) == new for t in self._tokens.values()), PATIENCE_S)
            if self._error or any(len(t) != new for t in self._tokens.values()):
                raise RuntimeError(f"the engine did not finish: {self._error or 'out of time'}")
            times = [[t - begin for t in self._times[name]] for name in names]
            return Measured([self._tokens[name] for name in names], times)


def _greedy(new: int, **more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **more)


class Generate:
    """`transformers`' own loop over a static batch of prompts of equal length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.generation_config.eos_token_id = None

    def __call__(self, prompts: list[list[int]], new: int) -> Measured:
        """Runs all prompts as one batch; the clock is read where the loop asks whether to stop."""
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_greedy(new),
            stopping_criteria=StoppingCriteriaList([stamp]),
        )
        times = [stamp - begin for stamp in stamps]
        return Measured(out[:, ids.shape[1] :].tolist(), [times] * len(prompts))


class Continuous:
    """`transformers`' continuous batching."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, prompts: list[list[int]], new: int) -> Measured:
        """Runs all prompts at once. Start-up (cache, warm-up) is not counted: time begins with the first request."""
        found = self.model.generate_batch(
            prompts, generation_config=_greedy(new, eos_token_id=-1), record_timestamps=True, progress_bar=False
        )
        outputs = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
        begin = min(output.created_time for output in outputs)
        times = [[t - begin for t in output.timestamps] for output in outputs]
        return Measured([output.generated_tokens for output in outputs], times)
