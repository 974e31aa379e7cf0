"""The file of the event log (`plan/log.py`): whole lines, or none."""

from __future__ import annotations

import contextlib
import logging
from io import FileIO
from pathlib import Path

from tessera.core.config.types import Config
from tessera.core.errors import ConfigError, Conflict

log = logging.getLogger(__name__)


class EventLog:
    """Without a buffer: it is wanted most after a crash. Raises `ConfigError` where nothing at all can be written."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._over = path, 0, False
        try:
            self._file = FileIO(path, "wb")
        except OSError as error:
            raise self._refused(error) from error

    def write(self, line: bytes) -> None:
        """Adds a line. Where the disk is full the log ends with its last whole line, which is told, and serving goes
        on: what is written for the sake of a crash is no reason for one."""
        if self._over:
            return
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._over = True
            with contextlib.suppress(OSError):  # of what is no file on a disk
                self._file.truncate(self._size)
            if not self._size:
                raise self._refused(error) from error
            log.error("%s: %s; it ends here, and replays up to here", self._flag, error.strerror)
        else:
            self._size += len(line)

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    @property
    def _flag(self) -> str:
        return f"--log-events {self._path}"

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError([Conflict((self._flag,), str(error), "Name a file that can be written.")])


def open_events(config: Config) -> EventLog | None:
    """The event log, if one was asked for. Each of several replicas has its own, with its number at the end."""
    path = config.logging.events
    if path is None:
        return None
    return EventLog(Path(f"{path}.{config.mesh.replica}" if config.mesh.replicas > 1 else path))
