#!/usr/bin/env python3
"""Tests every transfer engine, those too that CI does without: `make test-engines`.

Mooncake, and Debian's libibverbs that it wants, are put into a folder of their own beside the packages of `.venv`, so
that nobody else gets them; no root is needed. What is there already is kept.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOONCAKE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
DEBIAN = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
FILES = ("transfer/test_host", "transfer/test_nixl", "transfer/test_mooncake", "serve/test_handover_engines")
TESTS = ["-m", "engines or not engines", *(f"tests/{name}.py" for name in FILES)]


def install_mooncake(folder: Path) -> None:
    """Its wheel without what it depends on: nothing of that is needed to move bytes."""
    if not (folder / "mooncake").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-input", "--target", str(folder)]
        subprocess.run([*pip, MOONCAKE], check=True)


def install_ibverbs(folder: Path) -> list[Path]:
    """The folders in which the loader finds libibverbs; none where the system has it."""
    if ctypes.util.find_library("ibverbs"):
        return []
    system = folder / "system"
    if not system.exists():
        packages = folder / "packages"
        packages.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "-qq", "download", *DEBIAN], cwd=packages, check=True)
            for package in packages.glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(package), str(system)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"Mooncake needs libibverbs ({', '.join(DEBIAN)} of Debian): install it ({error})")
    return sorted({library.parent for library in system.rglob("*.so.*")})


def main() -> int:
    """The command: pytest's exit code."""
    folder = Path(sys.prefix) / "engines"
    install_mooncake(folder)
    found = {
        "PYTHONPATH": [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)],
        "LD_LIBRARY_PATH": [*install_ibverbs(folder), *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)],
    }
    env = {name: os.pathsep.join(str(path) for path in paths if str(path)) for name, paths in found.items()}
    probe = [sys.executable, "-c", "import mooncake.engine, nixl_cu12"]
    subprocess.run(probe, env={**os.environ, **env}, check=True)  # else their tests would only be skipped
    tests = [sys.executable, "-m", "pytest", *TESTS, *sys.argv[1:]]
    return subprocess.run(tests, check=False, cwd=ROOT, env={**os.environ, **env}).returncode


if __name__ == "__main__":
    sys.exit(main())
