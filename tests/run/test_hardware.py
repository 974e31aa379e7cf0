"""The memory that resolve may share out is what this process can still get."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from tessera.run.hardware import cores, free_memory, measure


def test_the_cpu_is_measured() -> None:
    found = measure("cpu")
    assert found.device == "cpu"
    assert cores() >= 1
    assert 0 < found.memory <= psutil.virtual_memory().total


def test_a_device_that_is_not_there_measures_the_cpu() -> None:
    assert measure("cuda").device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_limit_of_a_cgroup_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert free_memory(tmp_path) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1000
