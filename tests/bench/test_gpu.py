"""The benchmark of a GPU says what its figures were taken with, and where there is none it says that."""

from __future__ import annotations

import sys

import pytest
import torch

from tessera.bench import gpu


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
