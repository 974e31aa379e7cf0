"""How tests wait: for an event and not for seconds. A wait ends with its event, so its deadline may be generous: it is
there for faults, which never come, and not for a machine that is busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

NOTICED_S = 5.0  # within which the end of a worker is noticed: a promise, so these seconds are asserted
PATIENCE_S = 60.0  # what no event of a test takes, on a machine of two cores with much else to do


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Waits for a condition."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not within {seconds} s"
        time.sleep(0.01)


async def until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Waits for a condition while the event loop goes on."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not within {seconds} s"
        await asyncio.sleep(0.001)
