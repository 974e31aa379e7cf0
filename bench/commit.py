"""What a figure was measured at."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this tree, with a + where the tree differs from it; "unknown" where it is none of git's."""

    def git(*asked: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *asked]
        found = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
        return found.stdout.strip() if found is not None else ""

    head = git("rev-parse", "--short", "HEAD")
    return f"{head}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}" if head else "unknown"
