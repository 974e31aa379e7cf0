"""From the engine's outputs to answers: text without split characters, stop strings, logprobs, counts.

`deltas` yields what is new of each choice as it comes; `collect` waits for whole answers.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tessera.core.errors import CapacityError, PeerError, RequestError, TesseraError
from tessera.core.messages import Fault, FinishReason, HandoverTimes, Output, TokenLogprobs
from tessera.serve.client import EngineClient, Stream
from tessera.serve.schema import Item
from tessera.serve.text import Detokenizer, StopMatcher, Tokenizer

# What an output that failed becomes: 400, 503 or 503.
FAULTS: Mapping[Fault, type[TesseraError]] = {"request": RequestError, "busy": CapacityError, "engine": PeerError}


@dataclass(slots=True)
class Delta:
    """What is new of one choice of one item. `finish` is set on its last one; `matched`: what stopped it."""

    item: int
    choice: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    matched: int | str | None = None

    def add(self, later: Delta) -> None:
        """Appends what came later."""
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.prompt_logprobs = later.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs
        self.finish, self.matched = later.finish, later.matched


@dataclass(slots=True)
class Usage:
    """Tokens of one item: its prompt, of that from the cache, and generated in all its choices; and what its hand-over
    took, if there was one."""

    num_prompt: int
    num_cached: int = 0
    num_generated: int = 0
    handed: HandoverTimes | None = None


class ChoiceReader:
    """Turns the outputs of one choice into deltas."""

    def __init__(self, item: Item, tokenizer: Tokenizer | None) -> None:
        self._item = item
        self._text = Detokenizer(tokenizer, item.skip_special) if tokenizer is not None else None
        self._stops = StopMatcher(item.stops, item.keep_stop)
        self._count = 0

    def read(self, index: int, output: Output) -> Delta:
        """What is new. A stop string found ends the choice: `finish` is set though the output has none."""
        delta = Delta(index, output.choice)
        delta.finish, delta.matched = output.finish, output.matched
        tokens = [] if self._item.score_only else output.tokens
        logprobs = output.logprobs or []
        for i, token in enumerate(tokens):
            self._count += 1
            delta.tokens.append(token)
            delta.logprobs += logprobs[i : i + 1]
            ended = output.finish == "stop" and token == output.matched and i == len(tokens) - 1
            if self._text is None or (ended and not self._item.keep_stop):
                continue
            if self._take(delta, self._text.push(token)):
                return delta
        if delta.finish is not None and self._text is not None and not self._take(delta, self._text.flush()):
            delta.text += self._stops.flush()
        if self._item.score_only and delta.finish == "stop":
            delta.finish, delta.matched = "length", None
        return delta

    def _take(self, delta: Delta, piece: str) -> bool:
        """Adds text to the delta; True when a stop string ended it."""
        if self._count <= self._item.params.min_new_tokens:
            delta.text += piece
            return False
        text, stop = self._stops.push(piece)
        delta.text += text
        if stop is not None:
            delta.finish, delta.matched = "stop", stop
        return stop is not None


class Answering:
    """One request while it is answered. Use as a context: leaving it aborts what still runs.

    `observe`: called with each delta, for metrics. `interval`: tokens between two deltas of a choice.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        items: Sequence[Item],
        interval: int = 1,
        observe: Callable[[Delta], None] | None = None,
    ) -> None:
        self.items = items
        self.usage = [Usage(len(item.tokens)) for item in items]
        self.started = time.monotonic()
        self._interval = interval
        self._observe = observe
        self._textless = tokenizer is None
        self._stream: Stream = client.submit(items)
        self._readers = [[ChoiceReader(item, tokenizer) for _ in range(item.num_choices)] for item in items]
        self._held: dict[tuple[int, int], Delta] = {}
        self._begun: set[tuple[int, int]] = set()
        self._scored: set[tuple[int, int]] = set()
        self._prompts: dict[int, list[TokenLogprobs]] = {}  # by item, for all of its choices
        self._ended: set[tuple[int, int]] = set()
        self._aborted = False

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def abort(self) -> bool:
        """Ends the request; its choices finish with "abort". False where it has ended, or is about to."""
        running = self._stream.open and not self._aborted
        self._aborted = True
        self._stream.abort()
        return running

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, choice by choice: the first token at once, later ones every `interval` tokens.

        Tokens whose text is held back (part of a character, or of a stop string) come with the text. Raises
        RequestError when the engine refuses the request, TesseraError when it fails.
        """
        while self._stream.open:
            # The engine tells a prompt's logprobs once, with the first choice and in no later step than the others.
            for output in sorted(await self._stream.read(), key=lambda one: one.prompt_logprobs is None):
                key = (self._stream.index[output.request_id], output.choice)
                if key in self._ended:
                    continue  # came after the stop string was found
                delta = self._read(output)
                held = self._held.pop(key, None)
                if held is not None:
                    held.add(delta)
                    delta = held
                first = key not in self._begun
                enough = first or len(delta.tokens) >= self._interval
                shows = self._textless or bool(delta.text) or delta.prompt_logprobs is not None
                if delta.finish is not None or (enough and shows):
                    self._begun.add(key)
                    yield delta
                else:
                    self._held[key] = delta

    def _read(self, output: Output) -> Delta:
        index = self._stream.index[output.request_id]
        usage = self.usage[index]
        if output.finish == "error":
            raise FAULTS[output.fault or "engine"](output.error or "the engine gave up and said no reason")
        delta = self._readers[index][output.choice].read(index, output)
        delta.prompt_logprobs = self._prompt_logprobs(index, output)
        usage.num_generated += len(delta.tokens)
        usage.handed = output.handed or usage.handed
        usage.num_cached = max(usage.num_cached, output.num_cached)
        if delta.finish is not None:
            self._ended.add((index, output.choice))
            self._stream.stop(output.request_id, output.choice)
        if self._observe is not None:
            self._observe(delta)
        return delta

    def _prompt_logprobs(self, index: int, output: Output) -> list[TokenLogprobs] | None:
        """Those of an item's prompt, once for each of its choices."""
        if output.prompt_logprobs is not None:
            self._prompts[index] = output.prompt_logprobs
        key = (index, output.choice)
        if key in self._scored or index not in self._prompts:
            return None
        self._scored.add(key)
        return self._prompts[index]

    async def collect(self) -> list[list[Delta]]:
        """Whole answers: per item its kept choices, best first where more were drawn than kept."""
        whole = [[Delta(i, c) for c in range(item.num_choices)] for i, item in enumerate(self.items)]
        async for delta in self.deltas():
            whole[delta.item][delta.choice].add(delta)
        return [best(choices, item.num_kept) for choices, item in zip(whole, self.items, strict=True)]


def best(choices: list[Delta], keep: int) -> list[Delta]:
    """The `keep` choices with the highest mean logprob, renumbered; all of them in order when none is left out."""
    if keep == len(choices):
        return choices

    def mean(choice: Delta) -> float:
        found = [entry.logprob for entry in choice.logprobs if entry.logprob is not None]
        return sum(found) / len(found) if found else float("-inf")

    kept = sorted(choices, key=lambda choice: (-mean(choice), choice.choice))[:keep]
    for i, choice in enumerate(kept):
        choice.choice = i
    return kept
