"""What is committed belongs to no machine: no path or registry of one, and exact versions in one file only."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from house.source import ROOT

TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ".cu", ".cpp", ".h", ""}


def of_this_machine() -> list[str]:
    """Places that only this machine has: the checkout, the home folder, and where pip was told to look."""
    asked = [os.environ.get(f"{tool}_{name}", "") for tool in ("PIP", "UV") for name in ("FIND_LINKS", "INDEX_URL")]
    hosts = [host for url in asked for host in re.findall(r"^\w+://([^/]+)", url) if host != "pypi.org"]
    return [place for place in (f"{ROOT}/", f"{Path.home()}/", *asked, *hosts) if len(place) > 3]


def test_no_committed_file_names_this_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = of_this_machine()
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and Path(name).suffix in TEXT]
    found = [
        f"{file.relative_to(ROOT)}: {place}"
        for file in files
        if file.is_file()
        for place in places
        if place in file.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []


def test_constraints_are_exact_and_portable() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = [line for line in lines if line and not line.startswith("#")]
    assert [v for v in versions if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", v)] == []
    assert "torch==2.13.0" in versions


def test_pyproject_pins_nothing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    needs = [need.split(";")[0] for group in groups for need in group]  # a marker says where, not which
    assert [need for need in needs if re.search(r"==|@|<", need)] == []


def test_constraints_cover_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = [re.split(r"[>\[;]", need)[0].lower() for need in wanted]
    assert [name for name in names if f"\n{name}==" not in text] == []
