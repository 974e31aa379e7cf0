"""The benchmark of a GPU says what its figures were taken with, and where there is none it says that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests.bench.scripts import script

gpu = script("gpu")


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert (ended.value.code, "needs a CUDA device" in capsys.readouterr().err) == (2, True)


def test_figures_have_versions_and_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.versions()
    assert found["torch"] == torch.__version__
    assert all(found.values())
    monkeypatch.setenv("PATH", "")
    assert gpu.versions()["commit"] == "unknown"


@pytest.mark.parametrize("changed", ["", " M a file"])
def test_a_commit_tells_whether_the_tree_is_it(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text(f'#!/bin/sh\ncase "$*" in *rev-parse*) echo abc123;; *status*) echo "{changed}";; esac\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.commit() == ("abc123+" if changed else "abc123")
