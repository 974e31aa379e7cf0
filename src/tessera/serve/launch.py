"""`tessera serve`: this process becomes the front, and starts the engines'.

Exit codes: 0 after a signal, once what ran has ended; 128 + signal after a second one. Anything else is raised as a
`TesseraError`: `ConfigError` when it cannot be started as asked, others when the engine failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import uvloop

from tessera.serve import logs
from tessera.serve.fleet import Fleet
from tessera.serve.front import Front, Progress
from tessera.serve.process import WORKER
from tessera.serve.signals import StopSignals


def launch(
    asked: Mapping[str, object], environ: Mapping[str, str], progress: Progress, command: Sequence[str] = WORKER
) -> int:
    """Serves until a signal; returns the exit code. `asked`: flags in any spelling; `command`: the engine process."""
    logs.configure()
    return uvloop.run(_launch(asked, environ, progress, command))


async def _launch(
    asked: Mapping[str, object], environ: Mapping[str, str], progress: Progress, command: Sequence[str]
) -> int:
    signals = StopSignals()  # first, so that from here on none of them ends only one of the two processes
    fleet = Fleet(command)
    signals.at_once = fleet.kill
    try:
        await Front(fleet, signals, progress).run(asked, environ)
        return 0
    finally:
        fleet.close()
