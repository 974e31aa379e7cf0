"""A server as processes: started, read, signalled, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

import calls
from waits import PATIENCE_S, wait_until

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 259,  # those of the byte tokenizer
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 256,
}
TESTS = Path(__file__).parents[1]
LAUNCH = """
import sys, json
from tessera.core.errors import ConfigError, TesseraError
from tessera.serve.launch import launch
from tessera.commands.terminal import progress
asked, environ, worker = json.loads(sys.argv[1])
try:
    sys.exit(launch(asked, environ, progress, [sys.executable, worker]))
except TesseraError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, ConfigError) else 1)
"""


def model_folder(folder: Path) -> Path:
    """A model of two layers with the byte tokenizer; its weights are noise (--load-format dummy)."""
    from serve.support import TEMPLATE, byte_tokenizer

    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Running:
    """A server process and what it wrote. It has a temporary folder of its own, of a short name: sockets lie in it."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self._file = log.open("wb")
        self._temporary = tempfile.TemporaryDirectory(prefix="t-")
        environ = {**os.environ, "TMPDIR": self._temporary.name}
        self.process = subprocess.Popen(
            command, stdout=self._file, stderr=subprocess.STDOUT, cwd=log.parent, env=environ
        )

    @property
    def text(self) -> str:
        """All that was written so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = PATIENCE_S) -> re.Match[str]:
        """The first match in what it writes."""
        wait_until(lambda: re.search(pattern, self.text) or self.process.poll() is not None, seconds)
        found = re.search(pattern, self.text)
        assert found, f"no {pattern!r} in:\n{self.text}"
        return found

    def ready(self, seconds: float = PATIENCE_S) -> str:
        """Its address, once it is ready."""
        self.wait_for("ready to roll", seconds)
        return self.wait_for(r"Serving .* at (http://\S+) after")[1]

    def wires(self) -> list[Path]:
        """Folders of sockets that it has now."""
        return [path for path in Path(self._temporary.name).glob("tessera-*") if path.is_dir()]

    def children(self) -> list[psutil.Process]:
        """Its processes besides itself."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def programs(self) -> dict[psutil.Process, list[str]]:
        """Command lines of its processes besides itself."""
        found = {}
        for one in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[one] = one.cmdline()
        return found

    def engines(self, count: int) -> list[psutil.Process]:
        """The engine processes, the first started first, once so many run a program of their own.

        Each is told the front's number, last in its command line; a process that is not yet beyond its fork has its
        parent's command line, and the front's libraries may run programs for a moment.
        """
        found: list[psutil.Process] = []

        def seen() -> bool:
            found[:] = [one for one, words in self.programs().items() if words[-1:] == [str(self.process.pid)]]
            return len(found) == count

        wait_until(seen)
        return sorted(found, key=lambda one: (one.create_time(), one.pid))

    def engine(self) -> psutil.Process:
        """The engine process of a server that has one."""
        return self.engines(1)[0]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the server's own process."""
        self.process.send_signal(number)

    def code(self) -> int:
        """Waits for its end; the exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.text}") from None

    def close(self) -> None:
        """Ends whatever is left of it."""
        for one in [*self.children(), psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait(PATIENCE_S)
        self._file.close()
        self._temporary.cleanup()


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[Running]:
    """A server that is gone after the block."""
    server = Running(command, log)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def fake_server(folder: Path, environ: dict[str, str] | None = None, **flags: Any) -> Iterator[Running]:
    """A server around the fake engine, on any free port."""
    asked = {"model_path": str(folder), "served_model_name": "tiny", "port": 0, "device": "cpu", **flags}
    what = json.dumps([asked, environ or {}, str(TESTS / "serve" / "fake_worker.py")])
    with running([sys.executable, "-c", LAUNCH, what], folder / "log") as server:
        yield server


def gone(process: psutil.Process) -> None:
    """Waits for a process to end."""

    def ended() -> bool:
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(ended)


def health(url: str) -> int:
    """Status of /health; 0 when nobody answers."""
    try:
        return calls.get(f"{url}/health").status_code
    except httpx.TransportError:
        return 0
