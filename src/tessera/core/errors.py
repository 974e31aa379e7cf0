"""Every error that Tessera raises on purpose.

    TesseraError
    |- ConfigError(ValueError)     what was asked cannot be honoured; lists every conflict at once
    |- LayoutError(ValueError)     a tensor cannot be laid out, or two layouts do not tile each other
    |- ModelError(ValueError)      a checkpoint or its config.json is not one we can serve
    |- RequestError(ValueError)    a request is bad; names the field (HTTP 4xx)
    |- CapacityError(RuntimeError) a resource ran out where waiting cannot help
    |- LogError(ValueError)        an event log cannot be read, or does not replay to the steps it recorded
    |- DeadlineError(TimeoutError) a wait passed its deadline; says what was waited for
    `- PeerError(ConnectionError)  the other side of a connection failed or left

`assert` is for our own mistakes. An error says what was asked, what was found, what is allowed and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


class TesseraError(Exception):
    """Base of all errors raised on purpose."""


class LayoutError(TesseraError, ValueError):
    """A tensor cannot be laid out on a mesh, or two layouts do not tile each other."""


class ModelError(TesseraError, ValueError):
    """A checkpoint, or its `config.json`, is not one this build can serve."""


class RequestError(TesseraError, ValueError):
    """A request is bad. `field` names the field at fault, `status` is the HTTP status (4xx).

    `code`: OpenAI's word for it, where clients look for that.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.status = status
        self.code = code


class CapacityError(TesseraError, RuntimeError):
    """A resource ran out in a place where waiting cannot help."""


class LogError(TesseraError, ValueError):
    """An event log cannot be read, or does not replay to the steps that it recorded. `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line} of the event log: {message}")
        self.line = line


class DeadlineError(TesseraError, TimeoutError):
    """A wait passed its deadline."""


class PeerError(TesseraError, ConnectionError):
    """The other side of a connection failed, or left."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """One thing that cannot be honoured: the flags of both sides, why, and the smallest change that helps."""

    flags: tuple[str, ...]
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{' with '.join(self.flags)}: {self.reason}. {self.remedy}"


class ConfigError(TesseraError, ValueError):
    """Start-up is refused. `conflicts` holds all reasons, not only the first."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("\n".join(f"- {c}" for c in conflicts))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Conflict]]]:
        """A worker process hands it on whole: by default the text would be taken for the conflicts."""
        return type(self), (list(self.conflicts),)
