"""What is built is what is here: the wheel carries the code, the trained checkpoints and the type marker."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from house.source import PACKAGE, ROOT


def test_the_wheel_holds_the_package_and_its_assets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("tessera_llm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry = next(name for name in held if name.endswith("entry_points.txt"))
        assert "tessera = tessera.cli:main" in archive.read(entry).decode()
    wanted = {f"tessera/{path.relative_to(PACKAGE)}" for path in _carried(PACKAGE)}
    assert "tessera/py.typed" in wanted
    assert sorted(wanted - held) == []


def _carried(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"]
