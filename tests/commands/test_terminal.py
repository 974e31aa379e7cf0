"""What commands print fits the terminal that it is printed to."""

from __future__ import annotations

import sys

import pytest

from commands.support import run
from tessera.commands.terminal import table

ROWS = [("time per token after the first", "1234.56", "234.56", "34.56"), ("inter-token", "4134.40", "1.00", "2.00")]
HEAD = ("", "mean", "median", "p90")


@pytest.mark.parametrize("columns", [30, 46, 60, 200])
def test_no_number_and_no_name_is_broken(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table("latency, ms", ROWS, HEAD)
    table("decisions", [("max-running-requests", "64", "default for this device " * 9)])
    out = capsys.readouterr().out
    words = [word for row in (*ROWS, HEAD) for cell in row for word in cell.split()]
    for word in (*words, "max-running-requests", "default"):
        assert word in out


@pytest.mark.parametrize("columns", [60, 90])
def test_help_is_as_wide_as_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, "serve", "--help")
    wide = [line for line in out.splitlines() if len(line) > columns and not line.startswith("  --")]
    assert (code, wide) == (0, [])
