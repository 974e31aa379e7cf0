"""Promise 3, nothing leaks, holds for tests as well: one that leaves a thread or a process running fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from house.source import ROOT

TESTS = """
import os, subprocess, sys, threading, time
import conftest, pytest

conftest.PATIENCE_S = 0.3

SLEEP = [sys.executable, "-c", "import time; time.sleep(20)"]
event = threading.Event()

@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()

def test_good_of_a_wider_fixture(server): pass
def test_good_thread():
    thread = threading.Thread(target=time.sleep, args=(0.1,))
    thread.start()
def test_good_environment(): assert os.environ["OMP_NUM_THREADS"] == "1"
def test_bad_process(): subprocess.Popen(SLEEP)
def test_bad_thread(): threading.Thread(target=event.wait, daemon=True).start()
"""


def test_what_is_left_running_fails_the_test_that_left_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(TESTS)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-rA", f"--rootdir={tmp_path}"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False).stdout
    assert "ERROR test_sample.py::test_bad_process" in output
    assert "ERROR test_sample.py::test_bad_thread" in output
    assert output.count("\nERROR ") == 2, output
    assert "FAILED" not in output
    for good in ("of_a_wider_fixture", "thread", "environment"):
        assert f"PASSED test_sample.py::test_good_{good}" in output
