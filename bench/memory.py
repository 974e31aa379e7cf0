"""Peak memory of `tessera serve`, from start to answers, against its bound: `python bench/memory.py [--model-path ..]`.

Adds up the proportional set sizes (PSS) of the server's processes ten times a second: while it loads, and while it
answers long and short prompts at once. The bound is 1.3 times the weights, plus the pools, plus 900 MB (issue 2). The
default model is a random one of Qwen3-0.6B's shape in bfloat16 with the packaged tokeniser. Pools are all there from
the start, since they are zeroed. Exit code 1 where the bound is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from cpu import make_model
from tessera.models.folder import ASSETS

START_S, ANSWER_S, INTERVAL_S = 300.0, 900.0, 0.1
MB = 1_000_000


@dataclass
class Samples:
    """PSS of a process and all that it started, in bytes, and when."""

    process: psutil.Process
    sizes: list[tuple[float, int]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Samples until told to stop."""
        while not self._stop.wait(INTERVAL_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [self.process, *self.process.children(recursive=True)]
                self.sizes.append((time.monotonic(), sum(pss(p.pid) for p in tree)))

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Samples while the block runs."""
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def peak(self, since: float = 0.0, until: float = float("inf")) -> int:
        """The largest sum within a time."""
        return max((size for at, size in self.sizes if since <= at <= until), default=0)


def pss(pid: int) -> int:
    """Bytes of a process, what it shares divided among those who share it; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def model(given: Path | None) -> Iterator[Path]:
    """The folder of the model: the given one, or a random one."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="tessera-memory-") as name:
        folder = Path(name)
        make_model(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ASSETS / "abacus-hybrid" / file, folder)
        yield folder


def wait_for(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address, once the server says that it is ready."""
    until = time.monotonic() + START_S
    while not (found := re.search(r"at (http://\S+) after", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, f"the server did not start:\n{log.read_text()}"
        time.sleep(0.1)
    return found[1]


def ask(url: str, tokens: list[int], new: int) -> None:
    """One request; it must be answered in full."""
    body = {"model": "m", "prompt": tokens, "max_tokens": new, "ignore_eos": True, "temperature": 0, "logprobs": 2}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == new, answer.text


def load(url: str, pool: int, context: int, vocab: int, requests: int) -> None:
    """Prompts of very unequal length, all at once, that fill a pool of `pool` tokens together."""
    rng = random.Random(0)
    lengths = [min(max(2 * pool // requests - 64 if i % 2 else 24, 8), context - 40) for i in range(requests)]
    prompts = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
    with ThreadPoolExecutor(requests) as threads:
        list(threads.map(lambda prompt: ask(url, prompt, 24), prompts))


def measured(folder: Path, flags: Sequence[str], requests: int) -> dict[str, int]:
    """Serves the model and asks it; bytes by name."""
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:
        log = Path(temporary) / "log"
        line = [sys.executable, "-m", "tessera.cli", "serve", "--model-path", str(folder), "--served-model-name", "m"]
        with log.open("wb") as file:
            line += ["--device", "cpu", "--port", "0", *flags]
            process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)
        samples = Samples(psutil.Process(process.pid))
        try:
            with samples.taken():
                url = wait_for(process, log)
                ready = time.monotonic()
                config = httpx.get(f"{url}/server_info", timeout=60).json()["config"]
                memory, vocab = config["memory"], json.loads((folder / "config.json").read_text())["vocab_size"]
                pool = (memory["num_pages"] - 1) * memory["page_size"]
                load(url, pool, config["model"]["context_length"], vocab, requests)
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
    weights = memory["weight_bytes"]
    pools = memory["num_pages"] * memory["page_bytes"] + memory["num_slots"] * memory["slot_bytes"]
    return {
        "weights": weights,
        "pools": pools,
        "bound": int(1.3 * weights + pools + 900 * MB),
        "loading": samples.peak(until=ready),
        "answering": samples.peak(since=ready),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures as a table; 1 where the bound is broken."""
    parser = argparse.ArgumentParser(description="Peak memory of the server against its bound.")
    parser.add_argument("--model-path", type=Path, help="folder of a model; a random one is made without it")
    parser.add_argument("--requests", type=int, default=16, help="how many at once")
    parser.add_argument("flags", nargs="*", help="further flags of `tessera serve`, after --")
    args = parser.parse_args(argv)
    with model(args.model_path) as folder:
        found = measured(folder, args.flags, args.requests)
    rows = (found, ["---"] * len(found), [f"{size / MB:.0f} MB" for size in found.values()])
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return int(max(found["loading"], found["answering"]) > found["bound"])


if __name__ == "__main__":
    sys.exit(main())
