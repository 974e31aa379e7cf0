"""A storm on prefill and decode apart: `python bench/storm.py [--requests 300]`. Writes `bench/results/storm.md`.

`tessera up` brings up two prefill servers, a decode server and the router; clients come in a crowd, 60 % of them leave
at a random moment, and twice a prefill server is killed and replaced. Then every page and slot must be free on all
sides, and every answer that came whole must be that of one rank (float32, greedy). The exit code is 1 where it is not
so.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from commit import commit
from tessera import Engine

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "abacus-cpu.yaml"
CHANGES = ("prefill.workers=2", "prefill.tp-size=1", "decode.tp-size=2", "*.dtype=float32", "*.debug-checks=true")
PROMPTS = (
    "Ann has 17 apples. Ann buys 25 more. How many apples does Ann have now?",
    "Ben has 3 pears. " * 40,  # over several chunks
    "Once",
    "Leo reads 4 books, then 5 more.",
    "x " * 90,
)
GREEDY = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
LEAVE = 0.6
KILLS = 2
HELD = re.compile(r"^tessera:(num_running_reqs|num_queue_reqs|num_used_tokens|slot_usage)\{[^}]*\} (\S+)", re.M)
START_S, WAIT_S = 180.0, 120.0
PAGE = """# A storm on prefill and decode apart

`python bench/storm.py --requests {requests}`: two prefill servers (TP 1), one decode server (TP 2 in two data-parallel
groups, EP 2) and the router, by `tessera up`; {requests} requests within {within:.0f} s, {leave:.0%} of the clients
leave at a random moment, and {kills} times a prefill server is killed and started anew. All with `--debug-checks`.

{date}, commit {commit}, {cores} cores (load {load:.0f}), Linux {kernel}, Python {python}:

| | |
|---|---|
| answers | {whole} whole, {left} whose client left, {failed} failed with a clear error ({failures}) |
| whole answers that differ from those of one rank | {wrong} |
| requests without an end after {wait:.0f} s | {hung} |
| all pages and slots free, once all servers were back | {clean} |
| answers afterwards | {after} |
"""


class Storm:
    """One run."""

    def __init__(self, url: str, parent: int, requests: int, seed: int, expected: list[list[int]]) -> None:
        self.requests, self.within = requests, requests * 0.2
        self.codes: Counter[str] = Counter()
        self.wrong = 0
        self._parent, self._chance, self._expected = parent, random.Random(seed), expected
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False, limits=limits)

    async def run(self) -> None:
        """Clients, and whoever kills servers."""
        await asyncio.gather(*(self._client() for _ in range(self.requests)), self._kill())

    async def _client(self) -> None:
        chance = self._chance
        which, stream = chance.randrange(len(PROMPTS)), chance.random() < 0.5
        patience = chance.random() * 1.5 if chance.random() < LEAVE else WAIT_S
        await asyncio.sleep(chance.random() * self.within)
        try:
            async with asyncio.timeout(patience):
                self.codes[await self._ask(which, stream)] += 1
        except TimeoutError:
            self.codes["left" if patience < WAIT_S else "hung"] += 1

    async def _ask(self, which: int, stream: bool) -> str:
        body = {"text": PROMPTS[which], "sampling_params": GREEDY, "stream": stream}
        answer = await self._http.post("/generate", json=body)
        if answer.status_code != 200:
            return str(answer.status_code)
        if stream and '{"error"' in answer.text:
            return "error event"
        text = answer.text.split("data: ")[-2] if stream else answer.text
        ids = httpx.Response(200, text=text).json()["output_ids"]
        self.wrong += ids != self._expected[which]
        return "whole"

    async def _kill(self) -> None:
        for _ in range(KILLS):
            await asyncio.sleep(self.within / (KILLS + 1))
            fronts = [one for one in psutil.Process(self._parent).children() if "prefill" in one.cmdline()]
            self._chance.choice(fronts).kill()

    async def clean(self) -> str:
        """Waits until nothing is held anywhere; for how long, or what is held."""
        began = back = time.monotonic()
        while time.monotonic() - began < WAIT_S:
            workers = (await self._http.get("/workers")).json()["workers"]
            if all(worker["is_healthy"] for worker in workers):
                held = [await self._held(worker) for worker in workers]
                if not any(held):
                    return f"within {time.monotonic() - back:.1f} s"
            else:
                back = time.monotonic()
            await asyncio.sleep(0.2)
        return f"NO: {held}"

    async def _held(self, worker: dict[str, Any]) -> dict[str, float]:
        text = (await self._http.get(worker["url"] + "/metrics")).text
        held = {name: float(value) for name, value in HELD.findall(text)}
        return {name: value for name, value in {**held, "load": worker["load"]}.items() if value}

    async def after(self) -> str:
        """Answers when it is over."""
        before, self.wrong = self.wrong, 0
        codes = [await self._ask(which, False) for which in range(len(PROMPTS))]
        right, self.wrong = set(codes) == {"whole"} and not self.wrong, before
        await self._http.aclose()
        return "right" if right else f"NO: {codes}"


def up(log: Path) -> subprocess.Popen[bytes]:
    """Brings it up."""
    changes = [word for change in CHANGES for word in ("--set", change)]
    more = ["--port", "0", "--on-failure", "restart", *changes]
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tessera.cli", "up", str(RECIPE), *more], stdout=out, stderr=subprocess.STDOUT
        )


def url_of(log: Path) -> str:
    """The router's address, once all are ready."""
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        if found := re.search(r"processes are ready: (http://\S+)", log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.2)
    raise TimeoutError(log.read_text(errors="replace")[-3000:])


async def storm(url: str, parent: int, options: argparse.Namespace, expected: list[list[int]]) -> dict[str, Any]:
    """Runs it; what the page says."""
    made = Storm(url, parent, options.requests, options.seed, expected)
    await made.run()
    clean, after = await made.clean(), await made.after()
    codes = made.codes
    failures = {code: count for code, count in codes.items() if code not in ("whole", "left", "hung")}
    return {
        "requests": made.requests,
        "within": made.within,
        "whole": codes["whole"],
        "left": codes["left"],
        "hung": codes["hung"],
        "failed": sum(failures.values()),
        "failures": ", ".join(f"{count} x {code}" for code, count in sorted(failures.items())) or "none",
        "wrong": made.wrong,
        "clean": clean,
        "after": after,
    }


def main() -> int:
    """Runs the storm and writes the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with Engine("abacus-hybrid", device="cpu", dtype="float32", max_total_tokens=4096) as engine:
        answers = engine.generate(list(PROMPTS), GREEDY)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = up(log)
        try:
            found = asyncio.run(storm(url_of(log), process.pid, options, [one["output_ids"] for one in answers]))
            process.send_signal(signal.SIGINT)
            code = process.wait(WAIT_S)
        finally:
            process.kill()
        text = log.read_text(errors="replace")
        troubled = "Traceback" in text or text.count("was ended by SIGKILL") != KILLS
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cores": psutil.cpu_count(),
        "load": psutil.getloadavg()[1],
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "leave": LEAVE,
        "kills": KILLS,
        "wait": WAIT_S,
    }
    page = PAGE.format(**about, **found)
    (HERE / "results" / "storm.md").write_text(page)
    sys.stdout.write(page)
    bad = found["wrong"] or found["hung"] or "NO" in found["clean"] + found["after"] or troubled or code
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
