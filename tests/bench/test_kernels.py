"""Promise: the kernels' benchmark tells the time of a result that is off, and that it is off."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.bench.scripts import script

OFF = 0.0104  # rounds to what is allowed


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a case of three variants whose error is the option itself, and launches that take that long."""
    kernels, kernel_case = script("kernels"), script("kernel_case")

    def make(name: str) -> Any:
        return kernel_case.Case(
            name, 1e6, 1e6, kernel_case.COLD, make=lambda: torch.zeros(1), run=lambda x, off=0.001: x + off,
            check=lambda x, found: found.item(), variants=[{"off": OFF}, {"off": float("nan")}, {"off": 0.009}],
        )  # fmt: skip

    def seconds(launch: Any) -> float:
        launch()
        return 1e-3

    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(kernels, "measure_limits", lambda: kernels.Limits(1e12, 1e15))
    monkeypatch.setattr(kernels, "cases_of", lambda group, only: iter([make("one")]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    return kernels


def test_a_result_that_is_off_is_timed_and_marked(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known faults: a time of `inf`; one that misses by less than the digits shown, which nobody counted."""
    monkeypatch.setattr(sys, "argv", ["kernels.py", "norm", "--sweep"])
    with pytest.raises(SystemExit, match=r"^2 of 4 results"):
        kernels.main()
    _, *rows = capsys.readouterr().out.splitlines()
    assert {row.split(" | ")[2] for row in rows} == {"500.0"}
    assert sorted(row.split(" | ")[-1] for row in rows) == ["0.001", "0.009", "0.01!", "nan!"]


def test_json_says_it_too(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "norm", "--sweep", "--json"])
    with pytest.raises(SystemExit):
        kernels.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["us"], row["wrong"]) for row in rows if row["error"] == 0.01] == [(500.0, True)]
