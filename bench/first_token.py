"""Seconds to the first token: prefill and decode on a GPU each against one GPU that does both.

    python bench/first_token.py [--model bench/shapes/qwen3next16] [--device cpu] [--only apart] [--seconds 150]

Both sides serve over HTTP, with dummy weights. *alone*: prompts one after the other. *beside*: as many, two a second,
while other requests decode; what these lose shows in the largest gaps between their tokens. Prints a line of JSON for
each side, and what happens meanwhile on stderr; a side that fails, or is not through in its time, says why in its line,
with what it had measured. The results kept in `bench/results/handover.md` were taken so.

Apart, the first token's time is told by legs too: `http` (from the client by the router to the decode server, and
back), `arrive` (from there to its planner), `reserve` (until it has set memory aside), `letters` (its reservation's way
to prefill, what prefill waits for, and the record's way back), `prefill` (from the plan of the first chunk to the end
of the last), `transfer` (until the last byte is there), `tell` (from the record to the answer's first part).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from tessera.run.ahead import COMMAND
from tessera.serve.here import Here

MS, COMPILER = 1e3, COMMAND[-1]
HERE = Here({})  # keeps the ports
SHAPES = Path(__file__).resolve().parent / "shapes"
STOP_S, LOOK_S = 15.0, 0.1
READY = re.compile(r"processes are ready: http|^\[[^]]*\] INFO The server is fired up")
TOLD = re.compile(r"WARNING|ERROR|Traceback|Error:| ready| ended| exited| killed")  # once it is ready
OTHER_PROMPT, NEW = 64, 16
RECIPE = """name: first-token
resources: {{prefill_workers: 1, decode_workers: 1}}
backend:
  tessera_config:
    prefill: {{disaggregation-mode: prefill, {flags}}}
    decode: {{disaggregation-mode: decode, {flags}}}
"""


def tell(text: str) -> None:
    """For people who wait."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def flags_of(options: argparse.Namespace) -> dict[str, Any]:
    """What every server is started with."""
    longest = max(options.prompt + NEW, OTHER_PROMPT + tokens_beside(options.count))
    return {
        "model-path": options.model, "load-format": "dummy", "skip-tokenizer-init": True, "device": options.device,
        "context-length": 2 * longest, "disable-radix-cache": True, "max-running-requests": 64,
    }  # fmt: skip


def tokens_beside(count: int) -> int:
    """Tokens that each of the other requests decodes, while so many prompts come."""
    return 200 + 50 * count


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """How either side is started."""
    flags = flags_of(options)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(flags=", ".join(f"{name}: {json.dumps(value)}" for name, value in flags.items())))
    words = [
        w for name, value in flags.items() for w in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    tessera = [sys.executable, "-m", "tessera.cli"]
    return {
        "apart": [*tessera, "up", str(recipe), "--port", str(HERE.port())],
        "one": [*tessera, "serve", "--port", str(HERE.port()), *words],
    }


def compiles(process: psutil.Process) -> bool:
    """It is one of `tessera.run.ahead`'s, or of theirs."""
    try:
        return COMPILER in process.cmdline()
    except psutil.Error:  # it has ended
        return False


class Server:
    """The processes of one side: what they write goes to stderr, all of it until they are ready."""

    def __init__(self, command: list[str]) -> None:
        self.url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
        self._began, self._ready, self._last = time.monotonic(), threading.Event(), deque[str](maxlen=30)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line)
            if not self._ready.is_set() or TOLD.search(line):
                tell(f"{time.monotonic() - self._began:6.1f} s | {line.rstrip()}")
            if READY.search(line):
                self._ready.set()

    def until_ready(self, limit: float) -> float:
        """Seconds until all are ready. `TimeoutError` at `limit` of the clock, `RuntimeError` when they have ended."""
        while not self._ready.wait(LOOK_S):
            if (code := self._process.poll()) is not None:
                self._thread.join(STOP_S)
                raise RuntimeError(f"ended with {code} before it was ready: {''.join(self._last)[-2000:]}")
            if time.monotonic() > limit:
                raise TimeoutError("not ready in time")
        return time.monotonic() - self._began

    def until_compiled(self, limit: float) -> float:
        """Seconds until no process compiles kernels beside them any more: those take every core. At most to `limit`."""
        began = time.monotonic()
        while time.monotonic() < limit and any(map(compiles, psutil.Process(self._process.pid).children(True))):
            time.sleep(LOOK_S)
        return time.monotonic() - began

    def stop(self) -> None:
        """Ends them in order, or at once when that takes too long."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Times(NamedTuple):
    """Of one answer, in seconds: from the request to each chunk, and the legs of the first (none from one server)."""

    chunks: list[float]
    legs: dict[str, float]


def legs_of(meta: dict[str, Any], first: float) -> dict[str, float]:
    """What the first token's time, `first`, went to; `meta`: what the decode server told with it."""
    handed, answered = meta["handover"], meta["e2e_latency"]
    asked = handed["ended"] - handed["waiting"]
    opened = asked - handed["queue"] - handed["meeting"]
    return {
        "http": first - answered,
        "arrive": opened,
        "reserve": asked - opened,
        "letters": handed["waiting"] - handed["prefill"] - handed["transfer"],
        "prefill": handed["prefill"],
        "transfer": handed["transfer"],
        "tell": answered - handed["ended"],
    }


def medians(answers: Sequence[Times]) -> dict[str, float]:
    """Of each leg, in milliseconds."""
    return {leg: MS * statistics.median(a.legs[leg] for a in answers) for leg in answers[0].legs}


class Clients:
    """Requests of random tokens, streamed."""

    def __init__(self, url: str, vocab_size: int, seconds: float) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=seconds, trust_env=False)
        self._chance, self._vocab = random.Random(0), vocab_size

    async def times(self, prompt: int, new: int) -> Times:
        """Of one request."""
        ids = [self._chance.randrange(3, self._vocab) for _ in range(prompt)]
        params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": params, "stream": True}
        began, found, legs = time.monotonic(), list[float](), dict[str, float]()
        async with self._http.stream("POST", "/generate", json=body) as answer:
            if answer.is_error:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:500]}")
            async for line in answer.aiter_lines():
                if '"error"' in line:
                    raise RuntimeError(line)
                if line.startswith("data: {"):
                    found.append(time.monotonic() - began)
                    if len(found) == 1 and "handover" in (meta := json.loads(line[6:])["meta_info"]):
                        legs = legs_of(meta, found[0])
        return Times(found, legs)

    async def measure(self, prompt: int, count: int, others: int, found: dict[str, Any]) -> None:
        """Medians in milliseconds, put into `found`; `gap_ms`: over the other requests, of the largest gap between
        tokens from the second one on; `to_second_ms`: until that, for which a request that comes waits for a step."""
        for turn in range(3):  # graphs and kernels, of many rows too
            began = time.perf_counter()
            await asyncio.gather(
                *(self.times(prompt, NEW) for _ in range(2)), *(self.times(OTHER_PROMPT, 64) for _ in range(others))
            )
            tell(f"warm, turn {turn}: {time.perf_counter() - began:.1f} s")
        alone = [await self.times(prompt, NEW) for _ in range(count)]
        found["alone_first_ms"] = MS * statistics.median(t.chunks[0] for t in alone)
        found["alone_second_ms"] = MS * statistics.median(t.chunks[1] for t in alone)
        found["alone_legs_ms"] = medians(alone)
        tell(f"alone: {found['alone_first_ms']:.1f} ms")
        beside = [asyncio.create_task(self.times(OTHER_PROMPT, tokens_beside(count))) for _ in range(others)]
        await asyncio.sleep(0.5)
        firsts = []
        for _ in range(count):
            firsts.append(asyncio.create_task(self.times(prompt, NEW)))
            await asyncio.sleep(0.5)
        busy, streams = await asyncio.gather(*firsts), await asyncio.gather(*beside)
        ticks = [[b - a for a, b in pairwise(t.chunks[1:])] for t in streams]
        found["beside_first_ms"] = MS * statistics.median(t.chunks[0] for t in busy)
        found["beside_second_ms"] = MS * statistics.median(t.chunks[1] for t in busy)
        found["beside_legs_ms"] = medians(busy)
        found["gap_ms"] = MS * statistics.median(map(max, ticks))
        found["to_second_ms"] = MS * statistics.median(t.chunks[1] - t.chunks[0] for t in streams)
        found["token_ms"] = MS * statistics.median(tick for t in ticks for tick in t)


async def within(clients: Clients, options: argparse.Namespace, seconds: float, found: dict[str, Any]) -> None:
    """Measures, in so many seconds or less."""
    async with asyncio.timeout(seconds):
        await clients.measure(options.prompt, options.count, options.others, found)


def side(command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What is measured of one side; `error`: why that is not all."""
    limit, found = time.monotonic() + options.seconds, dict[str, Any]()
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    server = Server(command)
    try:
        found["ready_s"] = server.until_ready(limit)
        found["compiled_s"] = server.until_compiled(limit)
        left = max(limit - time.monotonic(), 1.0)
        asyncio.run(within(Clients(server.url, vocab_size, left), options, left, found))
    except (TimeoutError, RuntimeError, httpx.HTTPError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    finally:
        server.stop()
    return found


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(SHAPES / "qwen3next16"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--others", type=int, default=16)
    parser.add_argument("--only", choices=("apart", "one"))
    parser.add_argument("--seconds", type=float, default=150.0, help="for each side, its start included")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(options, Path(folder)).items():
            if options.only in (None, name):
                found = side(command, options)
                failed |= "error" in found
                sys.stdout.write(json.dumps({"what": name, "prompt": options.prompt, **found}) + "\n")
                sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
