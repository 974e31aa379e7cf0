"""Tessera's engine as the benchmarks run it: many prompts at once, and when each token came."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from tessera.core.messages import Fatal, Outbound, Outputs, SamplingParams, StepReport, Stop, Submit
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
    """The engine without the text side, in a thread of its own, with the configuration that a user gets.

    `steps`: the reports of the round's steps.
    """

    def __init__(self, flags: Mapping[str, object]) -> None:
        self.steps: list[StepReport] = []
        self._round, self._error = itertools.count(), ""
        self._changed = threading.Condition()
        self._tokens: dict[str, list[int]] = {}
        self._times: dict[str, list[float]] = {}
        self.core = prepared_core(prepare(flags, {}), self._take)
        self._thread = threading.Thread(target=self.core.run, name="tessera-bench")

    def __enter__(self) -> Ours:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.core.post(Stop(1.0))
        self._thread.join(PATIENCE_S)

    def settle(self) -> None:
        """Waits until all sizes of steps are recorded that were met or will be."""
        until = time.monotonic() + PATIENCE_S
        recordings = self.core.recordings
        while (recordings.num_left or recordings.under_way) and not self._error and time.monotonic() < until:
            time.sleep(0.01)

    def _take(self, message: Outbound) -> None:
        now = time.perf_counter()
        with self._changed:
            if isinstance(message, Outputs):
                for output in message.items:
                    self._tokens[output.request_id] += output.tokens
                    self._times[output.request_id] += [now] * len(output.tokens)
                    self._error = self._error or output.error or ""
            elif isinstance(message, StepReport):
                self.steps.append(message)
            elif isinstance(message, Fatal):
                self._error = message.error
            self._changed.notify_all()

    def __call__(self, prompts: list[list[int]], new: int, settled: bool = True) -> Measured:
        """Runs all prompts at once. `settled`: graphs of what ran before are recorded first, and not meanwhile."""
        if settled:
            self.settle()
        turn = next(self._round)
        names = [f"{turn}-{i}" for i in range(len(prompts))]
        params = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        with self._changed:
            self._tokens, self._times = {name: [] for name in names}, {name: [] for name in names}
            self.steps = []
            begin = time.perf_counter()
            for name, prompt in zip(names, prompts, strict=True):
                self.core.post(Submit(name, prompt, params))
            self._changed.wait_for(lambda: self._error or all(len(t) == new for t in self._tokens.values()), PATIENCE_S)
            if self._error or any(len(t) != new for t in self._tokens.values()):
                raise RuntimeError(f"the engine did not finish: {self._error or 'out of time'}")
            times = [[t - begin for t in self._times[name]] for name in names]
            return Measured([self._tokens[name] for name in names], times)
