#!/usr/bin/env python3
"""Makes `.venv`, whole or not at all. Every `make` target that needs it calls this; a ready one costs nothing.

A `.venv` is ready when its stamp, written last, matches what it should hold: the `[project]` and `[build-system]`
tables of pyproject.toml, constraints.txt, the Python version and the place. Without a stamp it was left half made, or
somebody else made it: it is removed and made anew. With the stamp of other dependencies it is updated in place.

A lock lets one process work at a time. The installers inherit it, so that it is free only when none is left.
INSTALLER=pip does without uv, which is only faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
RECIPE = 1  # raise it to have every .venv updated
EXTRAS = "dev"
WARM = (
    "import torch, transformers, starlette, uvicorn, uvloop, httptools, msgspec, zmq, prometheus_client, rich;"
    "import httpx, jinja2, psutil, openai, pytest, xdist, hypothesis;"
    "from transformers import AutoModelForCausalLM, AutoTokenizer"
)
# What pip was told by its environment, handed on to uv under its own names.
PIP_TO_UV = {
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_CERT": "SSL_CERT_FILE",
}


class Failed(Exception):
    """An installer ended with an error, or could not be started."""


def stamp_of(root: Path, venv: Path) -> str:
    """What a ready `venv` of the project in `root` carries as its stamp."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())
    wanted = {
        "recipe": RECIPE,
        "project": project["project"],
        "build": project["build-system"],
        "constraints": (root / "constraints.txt").read_text(),
        "python": sys.version_info[:2],
        "place": str(venv.absolute()),
    }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest() + "\n"


def stamp_file(venv: Path) -> Path:
    """Where the stamp lies."""
    return venv / "tessera-stamp"


def read_stamp(venv: Path) -> str | None:
    """The stamp of `venv`; None when it was never finished or its interpreter is gone."""
    try:
        return stamp_file(venv).read_text() if (venv / "bin" / "python").exists() else None
    except OSError:
        return None


def write_stamp(venv: Path, stamp: str) -> None:
    """Declares `venv` ready, in one step."""
    new = stamp_file(venv).with_suffix(".new")
    new.write_text(stamp)
    new.replace(stamp_file(venv))


def remove(venv: Path) -> None:
    """Removes `venv`, its stamp first."""
    stamp_file(venv).unlink(missing_ok=True)
    if venv.is_symlink():
        venv.unlink()
    elif venv.exists():
        shutil.rmtree(venv)


def _die_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # Linux: PR_SET_PDEATHSIG


def run(command: list[str], lock: int, env: dict[str, str] | None = None) -> None:
    """Runs one installer to its end; it goes when we go. Raises `Failed`."""
    try:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(lock,),
            preexec_fn=_die_with_parent,  # noqa: PLW1509 (there are no threads here)
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error}") from error
    try:
        code = child.wait()
    except BaseException:
        _stop(child)
        raise
    if code:
        raise Failed(f"{' '.join(command)}: exit code {code}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGKILL, 60)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.send_signal(number)
            child.wait(patience)
            return


def install(venv: Path, lock: int) -> None:
    """Brings `venv` from whatever it holds to what the project needs: torch first, so that nothing else chooses it."""
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-qq", "--no-compile", "--no-input", "-c", "constraints.txt"]
    if not (venv / "pyvenv.cfg").exists():
        say("an empty environment")
        run([sys.executable, "-m", "venv", "--without-pip", str(venv)], lock)
        run([python, "-m", "ensurepip", "--default-pip"], lock)
    constrained = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    torch = next(line for line in constrained if line.startswith("torch=="))
    say(torch)
    run([*pip, torch], lock)
    say("everything else")
    rest = ["--no-build-isolation", "-e", f".[{EXTRAS}]"]
    try:
        if os.environ.get("INSTALLER") == "pip":
            raise Failed("not asked for")
        run([*pip, "uv", "hatchling"], lock)
        env = {uv: os.environ[name] for name, uv in PIP_TO_UV.items() if name in os.environ and uv not in os.environ}
        uv = [str(venv / "bin" / "uv"), "pip", "install", "--quiet", "--python", python, "-c", "constraints.txt"]
        run([*uv, *rest], lock, {**os.environ, **env})
    except Failed as failed:
        say(f"pip instead of uv ({failed})")
        run([*pip, "hatchling"], lock)
        run([*pip, *rest], lock)
    say("bytecode")  # of what is imported; all of it would take three times as long
    run([python, "-W", "ignore", "-c", WARM], lock, {**os.environ, "PYTHONDONTWRITEBYTECODE": ""})


def say(what: str) -> None:
    """One line of progress."""
    print(f"venv: {what}", flush=True)


def make(venv: Path, root: Path = ROOT) -> None:
    """Returns when `venv` is ready. Raises `Failed`; KeyboardInterrupt passes through, with no process left."""
    wanted = stamp_of(root, venv)
    if read_stamp(venv) == wanted:
        return
    with open(venv.with_name(venv.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        found = read_stamp(venv)
        if found == wanted:
            return
        began = time.monotonic()
        if found is None:
            if venv.exists() or venv.is_symlink():
                say(f"{venv.name} was not finished; removing it")
            remove(venv)
        else:
            say("dependencies changed; updating")
            stamp_file(venv).unlink()
        install(venv, file.fileno())
        write_stamp(venv, wanted)
        say(f"ready after {time.monotonic() - began:.0f} s")


def main() -> int:
    """The command."""
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"Tessera needs Python {OLDEST[0]}.{OLDEST[1]} or newer; {sys.executable} is {found}. "
            "Name a newer one: make PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        make(ROOT / ".venv")
    except KeyboardInterrupt:
        print("venv: interrupted; the next make starts over", file=sys.stderr)
        return 130
    except Failed as failed:
        print(f"venv: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
