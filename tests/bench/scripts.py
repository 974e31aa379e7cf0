"""The scripts of `bench/`, imported as they import each other: by bare names, from their own folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


def script(name: str) -> ModuleType:
    """`bench/NAME.py` as a module; the folder is on the path only meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module(name)
