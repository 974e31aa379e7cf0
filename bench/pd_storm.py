"""A storm over a prefill and a decode server: `python bench/pd_storm.py`.

300 requests, most of them left by their client at a random moment, while the prefill server is killed (SIGKILL, with
its ranks) and replaced, twice. Then: no answer that came whole differs from the single engine's, nobody hangs, and all
pages and states are free on both sides. Writes `bench/results/pd_storm.md`; the exit code is 1 where one of it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import platform
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from commit import commit
from tessera.evals.tasks import TASKS
from tessera.serve.engine import Engine
from tessera.serve.here import Here

RESULTS = Path(__file__).resolve().parent / "results" / "pd_storm.md"
MODEL = "abacus-hybrid"
HERE = Here({})  # keeps the ports
FLAGS = ["--model-path", MODEL, "--device", "cpu", "--dtype", "float32", "--chunked-prefill-size", "64"]
PREFILL = ["--tp", "2", "--disaggregation-mode", "prefill"]
DECODE = ["--tp", "2", "--dp", "2", "--enable-dp-attention", "--disaggregation-mode", "decode"]
START_S, ANSWER_S, FREE_S = 180.0, 180.0, 60.0
HELD = re.compile(r"^tessera:(?:num_used_tokens|slot_usage)\{[^}]*\} (\S+)", re.MULTILINE)
PAGE = """# A storm: aborts, and a prefill server that is killed

`abacus-hybrid`, prefill TP 2, decode TP 2 DP 2, engine `local`, one client that asks both servers for each request.
{num} requests, {share:.0%} of them left by their client at a random moment; the prefill server and its ranks are killed
and started anew {kills} times meanwhile. Written by `python bench/pd_storm.py` at commit {commit} on
{machine}, {date}.

| | |
|---|---|
{rows}
"""


@dataclass
class Storm:
    """What became of the requests."""

    whole: dict[int, list[int]] = field(default_factory=dict)
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    texts: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0


class Server:
    """A server as a process. It keeps its ports when it is started anew."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        self.port, self.flags, self.log = HERE.port(), flags, folder / f"{flags[-1]}.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Until it is ready."""
        command = [sys.executable, "-m", "tessera.cli", "serve", *FLAGS, *self.flags, "--port", str(self.port)]
        with self.log.open("ab") as file:
            self.process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file)
        async with httpx.AsyncClient(trust_env=False) as http:
            until = time.monotonic() + START_S
            while time.monotonic() < until:
                try:
                    if (await http.get(f"{self.url}/health", timeout=5)).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.2)
        raise SystemExit(f"not ready in {START_S:g} s:\n{self.log.read_text()[-2000:]}")

    async def kill(self) -> None:
        """With all its processes, at once."""
        assert self.process is not None
        for one in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            one.kill()
        await self.process.wait()


Servers = tuple[Server, Server]


async def ask(http: httpx.AsyncClient, servers: Servers, body: dict[str, Any]) -> httpx.Response:
    """Both legs; decode's answer. The first that fails ends the other."""
    legs = [asyncio.create_task(http.post(f"{s.url}/generate", json=body, timeout=ANSWER_S)) for s in servers]
    try:
        for leg in asyncio.as_completed(legs):
            answer = await leg
            if answer.status_code != 200:
                return answer
        return legs[1].result()
    finally:
        for leg in legs:
            leg.cancel()
        await asyncio.gather(*legs, return_exceptions=True)


async def one(storm: Storm, http: httpx.AsyncClient, servers: Servers, i: int, body: Any, leave: float | None) -> None:
    """One request, and how it ended."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(leave):
            answer = await ask(http, servers, body)
    except TimeoutError:
        storm.ends["left by its client"] += 1
        return
    except httpx.HTTPError as error:
        storm.ends["its prefill server was dead"] += 1
        storm.texts[type(error).__name__] += 1
        return
    finally:
        storm.slowest = max(storm.slowest, time.monotonic() - began)
    found = answer.json()
    if answer.status_code == 200 and found["meta_info"]["finish_reason"]["type"] != "abort":
        storm.ends["answered"] += 1
        storm.whole[i] = found["output_ids"]
    else:
        storm.ends["told of an error"] += 1
        storm.texts[str(found.get("error", {}).get("message", "aborted"))[:90]] += 1


async def held(servers: Servers) -> float:
    """What both hold for requests."""
    async with httpx.AsyncClient(trust_env=False) as http:
        return sum([float(v) for s in servers for v in HELD.findall((await http.get(f"{s.url}/metrics")).text)])


async def rage(
    asked: list[dict[str, Any]], share: float, kills: int, folder: Path, rng: random.Random
) -> tuple[Storm, float]:
    """The storm, and the seconds after it until everything was free (-1: never)."""
    bootstrap = HERE.port()
    prefill = Server(["--disaggregation-bootstrap-port", str(bootstrap), *PREFILL], folder)
    decode = Server(DECODE, folder)
    servers, storm = (prefill, decode), Storm()
    await asyncio.gather(prefill.start(), decode.start())
    limits = httpx.Limits(max_connections=None)
    tasks = []
    try:
        async with httpx.AsyncClient(trust_env=False, limits=limits) as http:
            moments = {len(asked) * (k + 1) // (kills + 1) for k in range(kills)}
            for i, body in enumerate(asked):
                place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap, "bootstrap_room": i}
                leave = rng.uniform(0.0, 1.5) if rng.random() < share else None
                tasks.append(asyncio.create_task(one(storm, http, servers, i, {**body, **place}, leave)))
                await asyncio.sleep(rng.expovariate(40))
                if i in moments:
                    await prefill.kill()
                    await prefill.start()
            await asyncio.gather(*tasks)
        ended = time.monotonic()
        while await held(servers):
            if time.monotonic() - ended > FREE_S:
                return storm, -1.0
            await asyncio.sleep(0.1)
        return storm, time.monotonic() - ended
    finally:
        await asyncio.gather(*(server.kill() for server in servers if server.process), return_exceptions=True)


def main() -> int:
    """Runs it, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.6, help="Share of requests that are left.")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    questions = TASKS["gsm8k"].questions("heldout", options.num_requests)
    with Engine(MODEL, device="cpu", dtype="float32") as engine:
        asked: list[dict[str, Any]] = []
        for i, question in enumerate(questions):
            params = {"temperature": 0.6 * (i % 2), "sampling_seed": i, "max_new_tokens": 64}
            ids = engine.conversation([{"role": "user", "content": question.prompt}])
            asked.append({"input_ids": ids, "sampling_params": params})
        together = engine.generate(None, [a["sampling_params"] for a in asked], [a["input_ids"] for a in asked])
        wanted = [answer["output_ids"] for answer in together]
    with tempfile.TemporaryDirectory() as folder:
        storm, seconds = asyncio.run(rage(asked, options.share, options.kills, Path(folder), rng))
    differ = [i for i, tokens in storm.whole.items() if tokens != wanted[i]]
    rows = [f"| {what} | {count} |" for what, count in storm.ends.most_common()]
    rows += [f"| &nbsp;&nbsp;{text} | {count} |" for text, count in storm.texts.most_common(8)]
    rows += [f"| answers that differ from the single engine's | {len(differ)} |"]
    rows += [f"| slowest end of a request | {storm.slowest:.1f} s |"]
    rows += [f"| until every page and state was free | {f'{seconds:.1f} s' if seconds >= 0 else 'never'} |"]
    told = {
        "num": len(asked),
        "share": options.share,
        "kills": options.kills,
        "date": time.strftime("%F"),
        "commit": commit(),
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    options.output.write_text(PAGE.format(rows="\n".join(rows), machine=machine, **told))
    sys.stdout.write(options.output.read_text())
    return 0 if not differ and seconds >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
