"""SIGINT and SIGTERM: the first asks for an orderly end, the second for an end now."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable

log = logging.getLogger(__name__)
ASKED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Listens from its making on. `at_once` runs before the process ends on the second signal."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.at_once: Callable[[], None] = lambda: None
        for number in ASKED:
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    def _take(self, number: signal.Signals) -> None:
        if self.first.is_set():
            log.warning("%s again: ending now", number.name)
            self.at_once()
            os._exit(128 + number)
        log.info("%s: ending in order; once more ends now", number.name)
        self.first.set()
