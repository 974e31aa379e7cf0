"""Stands for `tessera` in tests of `tessera up`: workers are fake servers, the router is the real one.

The environment says what goes wrong: DIE_AFTER: seconds until it ends with 3; SICK: it never gets ready; DEAF: SIGTERM
does not end it; SLOW: every other probe is answered so many seconds late; ONCE: the name of a file, and with that it
never gets ready when it is started again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from serve.router.fakes import Fake, Rooms
from tessera.cli import main
from tessera.serve.listener import bind


class Open(Rooms):
    """Every room has been entered already: the other server is in another process."""

    def event(self, what: str, room: int) -> asyncio.Event:
        found = super().event(what, room)
        found.set()
        return found


def again() -> bool:
    """It was started before."""
    once = Path(os.environ.get("ONCE", os.devnull))
    found = once.is_file()
    once.touch()
    return found


async def serve(options: argparse.Namespace) -> int:
    role = {"null": "worker"}.get(options.disaggregation_mode, options.disaggregation_mode)
    if os.environ.get("DEAF"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fake = Fake(role, Open(), listening=bind(options.host, options.port))
    fake.mode = options.disaggregation_mode
    fake.health = 503 if os.environ.get("SICK") or again() else 200
    fake.health_lag = float(os.environ.get("SLOW", "0"))
    sys.stdout.write(f"a fake {role} with {' '.join(sys.argv[2:])}\n")
    sys.stdout.flush()
    await asyncio.sleep(float(os.environ.get("DIE_AFTER", "1000")))
    return 3


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        sys.exit(main(sys.argv[1:]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--disaggregation-mode", default="null")
    os._exit(asyncio.run(serve(parser.parse_known_args(sys.argv[2:])[0])))
