"""`python -m tessera.serve.recipe_check`: whether a recipe can run on this host; JSON in and out.

A process of its own, which ends: whoever measures a GPU holds some of its memory, and `tessera up` stays as long as the
workers do.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import msgspec

from tessera.core.errors import Conflict, PeerError
from tessera.serve.recipe import Recipe

SECONDS = 600.0  # a config.json may have to be fetched


class Checked(msgspec.Struct):
    """What was found. `conflicts`: why it cannot run. `gpus`: of this host, for its workers."""

    conflicts: list[Conflict]
    gpus: int


def checked(recipe: Recipe) -> Checked:
    """Asks a process that is gone afterwards. Raises PeerError when it fails, which it has told on standard error."""
    command = [sys.executable, "-P", "-m", "tessera.serve.recipe_check"]
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(recipe),
            stdout=subprocess.PIPE,
            timeout=SECONDS,
            check=True,
            start_new_session=True,  # Ctrl-C is ours
        )
    except subprocess.SubprocessError as error:
        raise PeerError(f"the recipe could not be checked: {error}") from error
    return msgspec.json.decode(done.stdout, type=Checked)


def main() -> int:
    """Checks the recipe that standard input has."""
    recipe = msgspec.json.decode(sys.stdin.buffer.read(), type=Recipe)
    conflicts, gpus = import_module("tessera.serve.recipe_plan").check(recipe)  # torch, which nobody else needs here
    sys.stdout.buffer.write(msgspec.json.encode(Checked(conflicts, gpus)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
