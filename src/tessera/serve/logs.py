"""How both processes log: lines with time and level on standard error."""

from __future__ import annotations

import logging

FORM = "[%(asctime)s] %(levelname)s {}%(message)s"


def configure(level: str = "info", who: str = "") -> None:
    """Sends everything of `level` and above to standard error; libraries speak from warnings on, unless debugging.

    `who`: stands before each message, where several processes speak.
    """
    logging.basicConfig(format=FORM.format(who), datefmt="%Y-%m-%d %H:%M:%S", force=True)
    wanted = logging.getLevelName(level.upper())
    logging.getLogger().setLevel(wanted if level == "debug" else max(wanted, logging.WARNING))
    for name in ("tessera", "uvicorn.access"):
        logging.getLogger(name).setLevel(wanted)
