"""Seconds to the first token: prefill and decode on a GPU each against one GPU that does both.

    python bench/first_token.py [--model bench/shapes/qwen3next16] [--device cpu]

Both sides serve over HTTP, with dummy weights. *alone*: prompts one after the other. *beside*: as many, two a second,
while other requests decode; what these lose shows in the largest gaps between their tokens. Prints a line of JSON for
each side; the results kept in `bench/results/handover.md` were taken so.
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
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from tessera.serve.here import free_port

SHAPES = Path(__file__).resolve().parent / "shapes"
START_S, WAIT_S = 180.0, 60.0
READY = re.compile(r"processes are ready: http|^\[[^]]*\] INFO The server is fired up", re.M)
RECIPE = """name: first-token
resources: {{prefill_workers: 1, decode_workers: 1}}
backend:
  tessera_config:
    prefill: {{disaggregation-mode: prefill, {flags}}}
    decode: {{disaggregation-mode: decode, {flags}}}
"""


def flags_of(options: argparse.Namespace) -> dict[str, Any]:
    """What every server is started with."""
    return {
        "model-path": options.model, "load-format": "dummy", "skip-tokenizer-init": True, "device": options.device,
        "context-length": 2 * options.prompt, "disable-radix-cache": True, "max-running-requests": 64,
    }  # fmt: skip


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """How either side is started."""
    flags = flags_of(options)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(flags=", ".join(f"{name}: {json.dumps(value)}" for name, value in flags.items())))
    words = [
        w for name, value in flags.items() for w in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    tessera, port = [sys.executable, "-m", "tessera.cli"], str(free_port())
    return {
        "one server": [*tessera, "serve", "--port", port, *words],
        "prefill and decode apart": [*tessera, "up", str(recipe), "--port", port],
    }


class Clients:
    """Requests of random tokens, streamed."""

    def __init__(self, url: str, vocab_size: int) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False)
        self._chance, self._vocab = random.Random(0), vocab_size

    async def times(self, prompt: int, new: int) -> list[float]:
        """Seconds from the request to each chunk of its answer."""
        ids = [self._chance.randrange(3, self._vocab) for _ in range(prompt)]
        params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": params, "stream": True}
        began, found = time.perf_counter(), []
        async with self._http.stream("POST", "/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if '"error"' in line:
                    raise RuntimeError(line)
                if line.startswith("data: {"):
                    found.append(time.perf_counter() - began)
        return found

    async def measure(self, prompt: int, count: int, others: int) -> dict[str, float]:
        """Medians in milliseconds; `gap_ms` is the median over requests of the largest gap between tokens."""
        for _ in range(3):  # graphs and kernels, of many rows too
            await asyncio.gather(
                *(self.times(prompt, 16) for _ in range(2)), *(self.times(64, 64) for _ in range(others))
            )
        alone = [await self.times(prompt, 16) for _ in range(count)]
        beside = [asyncio.create_task(self.times(64, 200 + 50 * count)) for _ in range(others)]
        await asyncio.sleep(0.5)
        firsts = []
        for _ in range(count):
            firsts.append(asyncio.create_task(self.times(prompt, 16)))
            await asyncio.sleep(0.5)
        busy, streams = await asyncio.gather(*firsts), await asyncio.gather(*beside)
        ticks = [[b - a for a, b in pairwise(t)] for t in streams]
        return {
            "alone_first_ms": 1e3 * statistics.median(t[0] for t in alone),
            "beside_first_ms": 1e3 * statistics.median(t[0] for t in busy),
            "gap_ms": 1e3 * statistics.median(map(max, ticks)),
            "token_ms": 1e3 * statistics.median(tick for t in ticks for tick in t),
        }


def url_of(log: Path, port: str) -> str:
    """The address, once all are ready."""
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        if READY.search(log.read_text(errors="replace")):
            return f"http://127.0.0.1:{port}"
        time.sleep(0.2)
    raise TimeoutError(log.read_text(errors="replace")[-3000:])


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(SHAPES / "qwen3next16"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--others", type=int, default=16)
    options = parser.parse_args()
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(options, Path(folder)).items():
            log, port = Path(folder) / "log", command[command.index("--port") + 1]
            with log.open("wb") as out:
                process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            try:
                clients = Clients(url_of(log, port), vocab_size)
                found = asyncio.run(clients.measure(options.prompt, options.count, options.others))
                sys.stdout.write(json.dumps({"what": name, "prompt": options.prompt, **found}) + "\n")
                sys.stdout.flush()
                process.send_signal(signal.SIGINT)
                process.wait(WAIT_S)
            except BaseException:
                sys.stdout.write(log.read_text(errors="replace")[-3000:])
                raise
            finally:
                process.kill()


if __name__ == "__main__":
    main()
