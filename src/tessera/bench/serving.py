"""Sends requests at a rate or so many at a time, and notes when each of their tokens came. Any client will do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field

from tessera.client import Ask, Client
from tessera.core.errors import TesseraError


@dataclass(slots=True)
class Timing:
    """One request. Seconds: `sent` on a common clock; `first`: until the first token; `gaps`: between neighbouring
    tokens (those that come together share the time since the last); `whole`: until the end. `error`: why it failed.
    """

    sent: float = 0.0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    whole: float = 0.0
    num_prompt: int = 0
    num_tokens: int = 0
    text: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Drive:
    """What came of a run. `seconds`: from the first request to the last end."""

    timings: list[Timing]
    seconds: float


async def drive(
    client: Client,
    asks: Sequence[Ask],
    times: Sequence[float],
    concurrency: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Drive:
    """Sends `asks[i]` at second `times[i]`, or as soon after it as fewer than `concurrency` are under way.

    A request that fails is noted and the others go on. `advance(done, total)` is called after each.
    """
    gate = asyncio.Semaphore(concurrency) if concurrency else nullcontext()
    timings: list[Timing] = [Timing() for _ in asks]
    done = 0
    began = time.perf_counter()

    async def send(ask: Ask, timing: Timing) -> None:
        nonlocal done
        async with gate:
            await measure(client, ask, timing)
        done += 1
        advance(done, len(asks))

    async with asyncio.TaskGroup() as group:
        for ask, at, timing in zip(asks, times, timings, strict=True):
            await asyncio.sleep(max(began + at - time.perf_counter(), 0))
            group.create_task(send(ask, timing))
    return Drive(timings, time.perf_counter() - began)


async def measure(client: Client, ask: Ask, timing: Timing) -> None:
    """Sends one request and notes its times."""
    timing.num_prompt = len(ask.tokens or ())
    timing.sent = before = time.perf_counter()
    parts: list[str] = []
    try:
        async with aclosing(client.stream(ask)) as pieces:
            async for piece in pieces:
                now = time.perf_counter()
                new, timing.num_tokens = piece.num_tokens - timing.num_tokens, piece.num_tokens
                timing.num_prompt = piece.num_prompt or timing.num_prompt
                parts.append(piece.text)
                if new and not timing.first:
                    timing.first, before = now - timing.sent, now
                elif new:
                    timing.gaps += [(now - before) / new] * new
                    before = now
    except TesseraError as error:
        timing.error = str(error)
    timing.whole = time.perf_counter() - timing.sent
    timing.text = "".join(parts)
