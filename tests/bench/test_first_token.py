"""The benchmark of the first token prints what it measured, and says why it is not more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("--device", "cpu", "--model", str(ROOT / "src/tessera/assets/abacus-hybrid"), "--prompt", "40")


def ran(*arguments: str) -> tuple[list[dict[str, Any]], int, str]:
    """Its lines, how it ended, and what it told meanwhile."""
    command = [sys.executable, str(ROOT / "bench" / "first_token.py"), *SMALL, "--count", "1", "--others", "1"]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=150)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode, done.stderr


def test_both_sides_are_measured() -> None:
    found, code, told = ran()
    assert code == 0, told
    assert [line["what"] for line in found] == ["apart", "one"]
    for line in found:
        assert all(line[what] > 0 for what in ("ready_s", "alone_first_ms", "beside_first_ms", "gap_ms", "token_ms"))
    assert "all 3 processes are ready" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seconds", "0.2"), "TimeoutError: not ready in time"),
        (("--device", "warp"), r"RuntimeError: ended with \d+ before it was ready"),
    ],
)
def test_a_side_that_fails_says_why_and_the_run_goes_on(arguments: tuple[str, ...], words: str) -> None:
    found, code, _ = ran(*arguments)
    assert code == 1
    assert [line["what"] for line in found] == ["apart", "one"]
    for line in found:
        assert re.search(words, line["error"]), line
