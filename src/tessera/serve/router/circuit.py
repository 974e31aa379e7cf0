"""Whether a server is up, as a small state machine: what requests and probes say, and when it may be tried again.

    unknown --good probe--> up --`threshold` faults in a row--> down
    down --good probe--> up where the probes had failed as well (it was away), else trial
    trial: one request at a time, until one is answered --> up, or fails --> down

Only faults count: status 5xx, silence, a broken connection. Time is handed in, seconds of any clock.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Standing(StrEnum):
    """What a server is to the router."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    TRIAL = "trial"


class Circuit:
    """One server's standing. `threshold`: faults in a row, of requests or of probes, that take it down.

    `changed` is called after every change of it, whatever brought it about, with the seconds since the change before.
    """

    def __init__(
        self, threshold: int = 3, now: float = 0.0, changed: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.standing = Standing.UNKNOWN
        self.reason = "it has not answered yet"
        self.since = now
        self._threshold, self._tries, self._changed = threshold, 0, changed
        self._faults = self._misses = 0  # in a row: of requests, of probes

    @property
    def takes(self) -> bool:
        """True when a request may be sent."""
        return self.standing is Standing.UP or (self.standing is Standing.TRIAL and self._tries == 0)

    def sent(self) -> None:
        """A request is under way; exactly one of `good`, `fault` and `dropped` ends it."""
        self._tries += 1

    def answered(self, now: float) -> None:
        """The answer to a request has begun, and well. A server on trial has passed; its faults are not forgotten."""
        if self.standing is Standing.TRIAL:
            self._become(Standing.UP, "", now)

    def good(self, now: float) -> None:
        """A request ended, and the server did its part (a refusal, 4xx, is that too)."""
        self._tries -= 1
        self._faults = 0
        self.answered(now)
        if self.standing is Standing.UP:
            self.reason = ""

    def fault(self, why: str, now: float) -> None:
        """A request ended by the server's fault."""
        self._tries -= 1
        self._faults += 1
        self._wrong(why, self._faults, now)

    def dropped(self) -> None:
        """A request was given up for reasons of others: it says nothing."""
        self._tries -= 1

    def probed(self, why: str | None, now: float) -> None:
        """A probe ended; `why`: what was wrong."""
        if why is not None:
            self._misses += 1
            self._wrong(why, self._misses, now)
            return
        was_away, self._misses = self._misses > 0, 0
        if self.standing is Standing.UNKNOWN or (self.standing is Standing.DOWN and was_away):
            self._faults = 0
            self._become(Standing.UP, "", now)
        elif self.standing is Standing.DOWN:
            self._become(Standing.TRIAL, self.reason, now)

    def _wrong(self, why: str, in_a_row: int, now: float) -> None:
        self.reason = why
        up = self.standing is Standing.UP
        if self.standing is Standing.TRIAL or (up and in_a_row >= self._threshold):
            self._become(Standing.DOWN, why, now)

    def _become(self, standing: Standing, reason: str, now: float) -> None:
        seconds = now - self.since
        self.standing, self.reason, self.since = standing, reason, now
        self._changed(seconds)
