"""How far the weights of a model are, told not more often than anybody looks."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 0.05


class Seldom:
    """A `Progress` that hands on to `tell` the first numbers, the last ones, and some in between."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell, self._next = tell, 0.0

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` elements are loaded."""
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + EVERY_S
            self._tell(done, total)
