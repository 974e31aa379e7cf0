"""Child processes end with their parent, without a word: nothing is left behind, and nobody reads a traceback."""

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("gone", [True, False])
def test_a_child_whose_parent_ended_before_it_began_ends_as_if_the_kernel_had_ended_it(gone: bool) -> None:
    code = "import os, sys; from tessera.run.children import die_with; die_with(os.getppid() + int(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(int(gone))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL if gone else 0, "", "")
