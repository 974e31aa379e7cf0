"""`.venv` is whole or not at all: whatever ends the making of one, the next `make` mends it, and nothing runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import make_venv

# The tool with an installer that leaves marks in the folder `root`: {body} is what it does for the child it starts.
DRIVER = """
import pathlib, sys
sys.path.insert(0, {tools!r})
import make_venv
root = pathlib.Path({root!r})
def install(venv, lock):
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    with open(root / "installs", "a") as file:
        file.write("x")
    make_venv.run([sys.executable, "-c", {child!r}], lock)
make_venv.install = install
make_venv.stamp_of = lambda *_: "wanted"
make_venv.ROOT = root
sys.exit(make_venv.main())
"""
SLOW = "import os, pathlib, time; pathlib.Path('child').write_text(str(os.getpid())); time.sleep(60)"
BRIEF = "import time; time.sleep(0.3)"


def start(root: Path, child: str) -> subprocess.Popen[str]:
    code = DRIVER.format(tools=str(Path(make_venv.__file__).parent), root=str(root), child=child)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(root: Path, child: str = BRIEF) -> tuple[int, str]:
    process = start(root, child)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def wait_for_child(root: Path) -> int:
    """Id of the installer's process, once it runs."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (root / "child").exists() and (text := (root / "child").read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError("the installer did not start")


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_making_cut_short_leaves_no_process_and_is_made_anew(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, SLOW)
    child = wait_for_child(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert_gone(child)
    assert make_venv.read_stamp(tmp_path / ".venv") is None

    (tmp_path / ".venv" / "leftover").touch()
    code, output = finish(tmp_path)
    assert (code, make_venv.read_stamp(tmp_path / ".venv")) == (0, "wanted"), output
    assert not (tmp_path / ".venv" / "leftover").exists()


def test_a_failed_installer_fails_the_make_and_leaves_no_stamp(tmp_path: Path) -> None:
    code, output = finish(tmp_path, "raise SystemExit(3)")
    assert code == 1
    assert "exit code 3" in output
    assert make_venv.read_stamp(tmp_path / ".venv") is None


def test_two_at_once_install_once(tmp_path: Path) -> None:
    both = [start(tmp_path, BRIEF) for _ in range(2)]
    assert [process.communicate(timeout=30) and process.returncode for process in both] == [0, 0]
    assert (tmp_path / "installs").read_text() == "x"


def project(root: Path, dependency: str, line_length: int = 120) -> Path:
    """A project of one dependency; returns where its .venv goes."""
    build = "[build-system]\nrequires = ['hatchling']\n"
    tables = f"[project]\nname = 'x'\ndependencies = ['{dependency}']\n[tool.ruff]\nline-length = {line_length}\n"
    (root / "pyproject.toml").write_text(build + tables)
    (root / "constraints.txt").write_text("x==1\n")
    return root / ".venv"


def test_only_a_change_of_dependencies_updates_and_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installs: list[bool] = []

    def install(venv: Path, lock: int) -> None:
        installs.append(venv.exists())
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()

    monkeypatch.setattr(make_venv, "install", install)
    make_venv.make(project(tmp_path, "numpy"), tmp_path)
    make_venv.make(project(tmp_path, "numpy", line_length=100), tmp_path)
    assert installs == [False]
    make_venv.make(project(tmp_path, "scipy"), tmp_path)
    assert installs == [False, True]
    (tmp_path / "constraints.txt").write_text("x==2\n")
    make_venv.make(tmp_path / ".venv", tmp_path)
    assert installs == [False, True, True]


def test_an_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert make_venv.main() == 1
    error = capsys.readouterr().err
    assert "3.11 or newer" in error
    assert "PYTHON=python3.12" in error
