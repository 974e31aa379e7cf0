"""Puts code of a test into processes of ranks, before anything of theirs runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PREAMBLE = """
import json, sys
rank = json.loads(sys.orig_argv[-1])["rank"] if "tessera.run.rank" in sys.orig_argv else -1
"""


def inject(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of ranks that start from now on run `code`, which knows its `rank`; other processes have -1."""
    (folder / "sitecustomize.py").write_text(PREAMBLE + code)
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
