"""What tests of commands share: a model that needs no checkpoint, and the command as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tessera.cli import main
from tessera.models.folder import ASSETS
from tiny import QWEN3

FLAGS = ["--load-format", "dummy", "--device", "cpu", "--max-running-requests", "8", "--max-total-tokens", "2048"]
QUIET = ["--log-level", "warning"]
COMMAND = [sys.executable, "-m", "tessera.cli"]


def fill(folder: Path) -> Path:
    """A model folder without weights: a tiny model with the packaged tokenizer and chat template."""
    for path in (ASSETS / "abacus-hybrid").glob("*.json*"):
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps({**QWEN3, "vocab_size": 512, "max_position_embeddings": 2048}))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, standard output, standard error."""
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's own refusals and --help
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@contextmanager
def started(*argv: str, **more: object) -> Iterator[subprocess.Popen[str]]:
    """A command as a process in a session of its own; whatever of it is left at the end is killed."""
    process = subprocess.Popen(
        [*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **more
    )  # type: ignore[call-overload]
    try:
        yield process
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def session(leader: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
