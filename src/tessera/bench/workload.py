"""What a benchmark asks: random token ids of random lengths, or prompts from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.client import Ask
from tessera.core.errors import RequestError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths are drawn evenly from `ratio * longest` to `longest` (SGLang's `--random-range-ratio`)."""

    input: int
    output: int
    ratio: float = 1.0

    def draw(self, rng: random.Random, longest: int) -> int:
        """One length, at least 1."""
        return rng.randint(max(round(longest * self.ratio), 1), longest)


def random_asks(count: int, lengths: Lengths, vocab_size: int, rng: random.Random, like: Ask) -> list[Ask]:
    """Prompts of random token ids; everything else as in `like`."""
    asks = []
    for _ in range(count):
        size, most = lengths.draw(rng, lengths.input), lengths.draw(rng, lengths.output)
        asks.append(replace(like, tokens=[rng.randrange(vocab_size) for _ in range(size)], max_tokens=most))
    return asks


def read_asks(path: Path, count: int | None, lengths: Lengths, rng: random.Random, like: Ask) -> list[Ask]:
    """Prompts of a JSON-lines file: `prompt` (text or token ids) or `messages`, and perhaps `output_len`.

    The first `count`, over again where the file has fewer. Raises RequestError naming the line.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"{path}: found no prompts; expected one JSON object on each line", "dataset_path")
    asks = [_read(line, f"{path}, line {i}", like) for i, line in enumerate(lines, 1)]
    chosen = [asks[i % len(asks)] for i in range(count or len(asks))]
    return [replace(a, max_tokens=a.max_tokens or lengths.draw(rng, lengths.output)) for a in chosen]


READERS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], dict[str, Any]]]] = {
    "prompt": ((str, list), lambda value: {"text": value} if isinstance(value, str) else {"tokens": value}),
    "messages": (list, lambda value: {"messages": value}),
    "output_len": (int, lambda value: {"max_tokens": value}),
}


def _read(line: str, where: str, like: Ask) -> Ask:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where}: {error}", "dataset_path") from error
    if not isinstance(row, dict) or len({"prompt", "messages"} & row.keys()) != 1:
        raise RequestError(f'{where}: expected an object with either "prompt" or "messages"', "dataset_path")
    fields: dict[str, Any] = {}
    for name, (kind, make) in READERS.items():
        if name in row:
            if not isinstance(row[name], kind):
                raise RequestError(f"{where}: {name} is {type(row[name]).__name__}", "dataset_path")
            fields |= make(row[name])
    return replace(like, **fields)


def arrivals(count: int, rate: float | None, rng: random.Random) -> Sequence[float]:
    """Seconds at which requests arrive: a Poisson process of `rate` a second; None: all at once."""
    if rate is None:
        return [0.0] * count
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(rate)
    return times
