"""An engine without a model: speaks the messages of the real one; its tokens follow from the prompt.

Token i of choice c continues the bytes of `ANSWER` as ids of the byte-level test tokenizer: text is predictable.
`delay`: seconds of a step; `hold`: a file, while which exists nothing steps. Prompts that begin with the token of a
fault cause it.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tessera.core.messages import (
    Abort,
    EndProfile,
    Fatal,
    Fault,
    Inbound,
    Outbound,
    Output,
    Outputs,
    Profile,
    Profiled,
    Ready,
    StepReport,
    Stop,
    Submit,
    Tick,
    TokenLogprobs,
)

EOS = 256  # <|endoftext|> of the test tokenizer
REFUSE, FAIL, DIE, HANG, BUSY = 1, 2, 3, 4, 5  # first token of a prompt that causes a fault
ANSWER = "The answer is 42. Grüße, 世界 🎉! "
log = logging.getLogger(__name__)


def answer_tokens(params: Any) -> list[int]:
    """What a choice says before it ends or begins again."""
    return list(ANSWER.encode()) + ([] if params.ignore_eos else [EOS])


@dataclass
class Row:
    """A choice that runs."""

    submit: Submit
    choice: int
    count: int = 0


@dataclass
class FakeEngine:
    """Messages in by `post`, out by `sink`; `step()` runs one step, `run()` runs until Stop."""

    sink: Callable[[Outbound], None]
    delay: float = 0.0
    hold: Path | None = None
    rows: list[Row] = field(default_factory=list)
    seen: list[Inbound] = field(default_factory=list)
    steps: int = 0
    hung: bool = False
    profiled: bool = False

    def __post_init__(self) -> None:
        self.inbox: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self.stopping = False

    def post(self, message: Inbound) -> None:
        self.inbox.put(message)

    def info(self) -> dict[str, object]:
        return {"engine": "fake"}

    def take(self, message: Inbound) -> list[Output]:
        """What a message does at once."""
        self.seen.append(message)
        if isinstance(message, Submit):
            assert isinstance(message.tokens, list)
            first = message.tokens[0]
            if first in (REFUSE, BUSY):
                fault: Fault = "request" if first == REFUSE else "busy"
                output = Output(message.request_id, 0, [], finish="error", error="no room", fault=fault)
                return [msgspec.structs.replace(output, choice=c) for c in range(message.n)]
            if first == FAIL:
                raise RuntimeError("asked to fail")
            if first == DIE:
                os._exit(9)
            self.hung |= first == HANG
            self.rows += [Row(message, choice) for choice in range(message.n)]
        elif isinstance(message, Abort):
            ended = [
                r for r in self.rows if r.submit.request_id == message.request_id and message.choice in (None, r.choice)
            ]
            self.rows = [r for r in self.rows if r not in ended]
            return [Output(r.submit.request_id, r.choice, [], finish=message.reason) for r in ended]
        elif isinstance(message, Stop):
            self.stopping = True
        elif isinstance(message, Profile | EndProfile):
            starts = isinstance(message, Profile)
            self.sink(Profiled(message.id, error="already so" if starts == self.profiled else None))
            self.profiled = starts
        return []

    def step(self) -> None:
        """One token for every choice."""
        outputs = [self._token(row) for row in self.rows]
        self.rows = [row for row, out in zip(self.rows, outputs, strict=True) if out.finish is None]
        if outputs:
            self.sink(Outputs(outputs))
        self.steps += 1
        new = sum(o.num_prompt for o in outputs)
        label = "EXTEND" if new else "DECODE"
        n = len(outputs)
        self.sink(StepReport(self.steps, label, int(new > 0), new, 0, n, 0, n, 100, 0, 0, 0, 0, n, self.delay))

    def _token(self, row: Row) -> Output:
        params, submit = row.submit.params, row.submit
        words = answer_tokens(params)
        token = words[row.count % len(words)]
        row.count += 1
        output = Output(submit.request_id, row.choice, [token])
        if params.logprobs >= 0:
            output.logprobs = [entry(token, params.logprobs, params.token_ids_logprob, -0.5 - row.choice)]
        if row.count == 1:
            output.num_prompt, output.num_cached = len(submit.tokens), len(submit.tokens) // 2
            if params.prompt_logprobs >= 0 and not row.choice:  # they are told once, with the first choice
                output.prompt_logprobs = [
                    entry(t, params.prompt_logprobs, params.token_ids_logprob, -1.0 if i else None)
                    for i, t in enumerate(submit.tokens)
                ][params.logprob_start :]
        if token == EOS or token in params.stop_token_ids:
            output.finish, output.matched = "stop", token
        elif row.count >= params.max_new_tokens:
            output.finish = "length"
        return output

    def turn(self) -> None:
        """Everything posted, then a step if something runs."""
        outputs: list[Output] = []
        while not self.inbox.empty():
            outputs += self.take(self.inbox.get())
        if outputs:
            self.sink(Outputs(outputs))
        if self.rows and not self.hung and not (self.hold is not None and self.hold.exists()):
            self.step()

    def run(self) -> None:
        self.sink(Ready(self.info()))
        try:
            while not (self.stopping and not self.rows):
                if not self.hung:  # what hangs says nothing, whatever is aborted
                    self.turn()
                if not self.rows:
                    self.sink(Tick(time.monotonic()))
                time.sleep(self.delay or 0.001)
        except RuntimeError as error:
            log.exception("the fake engine failed")
            self.sink(Fatal(str(error)))


def entry(token: int, top: int, asked: Sequence[int], logprob: float | None) -> TokenLogprobs:
    if logprob is None:
        return TokenLogprobs(None)
    likeliest = [token, *(i for i in range(65, 200) if i != token)][:top]
    values = [logprob - 0.25 * i for i in range(len(likeliest))]
    return TokenLogprobs(logprob, likeliest, values, [logprob - 1.0] * len(asked))
