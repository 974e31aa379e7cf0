"""`python -m tessera.serve.tethered PARENT COMMAND...`: becomes COMMAND, which the kernel ends when PARENT ends."""

from __future__ import annotations

import os
import sys

from tessera.run.children import die_with

if __name__ == "__main__":
    die_with(int(sys.argv[1]))  # it outlives the change of program (prctl(2))
    os.execvp(sys.argv[2], sys.argv[2:])
