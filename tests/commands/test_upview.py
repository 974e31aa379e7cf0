"""What `tessera up` shows: lines with names, files of them, and silence once nobody reads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tessera.commands.upview import screen


def test_lines_have_names_and_go_to_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with screen(tmp_path / "logs") as view:
        view.line("a", "one [bold]")
        view.line("b", "two")
        view.change("b ended", [])
        view.line("a", "three")
    assert capsys.readouterr().out.splitlines() == ["[a] one [bold]", "[b] two", "[up] b ended", "[a] three"]
    assert (tmp_path / "logs" / "a.log").read_text() == "one [bold]\nthree\n"
    assert (tmp_path / "logs" / "b.log").read_text() == "two\n"


def test_that_nobody_reads_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            """Nothing is held."""

        def isatty(self) -> bool:
            return False

    with screen(tmp_path) as view:
        monkeypatch.setattr(sys, "stdout", Gone())
        with pytest.raises(BrokenPipeError):
            view.line("a", "one")
        view.line("a", "two")
        view.change("a ended", [])
    assert (tmp_path / "a.log").read_text() == "one\ntwo\n"
