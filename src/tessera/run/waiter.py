"""To wait for a step and for other things at once: a thread waits for the step and makes a file readable."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

from tessera.run.host import Download
from tessera.run.mailbox import counter, readable

log = logging.getLogger(__name__)

CLOSE_S = 5.0

Results = Sequence[Future[Download]]  # of one step, one for each rank


class Waiter:
    """Waits for launched steps, in order, in a thread: `ended` is readable once for each that has ended."""

    def __init__(self) -> None:
        self.ended = counter()
        self._queue: queue.SimpleQueue[Results] = queue.SimpleQueue()
        weakref.finalize(self, os.close, self.ended)
        self._thread = threading.Thread(target=self._run, name="tessera-waiter", daemon=True)
        self._thread.start()

    def put(self, results: Results) -> None:
        """The next step to wait for."""
        self._queue.put(results)

    def count(self) -> int:
        """How many have ended since it was asked last; `ended` must be readable."""
        return os.eventfd_read(self.ended)

    def close(self) -> None:
        """It ends after what it was given. One that frees tensors while the interpreter ends aborts the process."""
        self._queue.put(())
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("a step still runs after %g s, and who waits for it is left to itself", CLOSE_S)

    def _run(self) -> None:
        while results := self._queue.get():
            try:
                for result in results:
                    with contextlib.suppress(CancelledError):
                        if result.exception() is None:
                            result.result().wait()
            finally:  # whoever collects it learns what is wrong
                os.eventfd_write(self.ended, 1)


class Watch:
    """Waits for the oldest step of ranks in this process, or for news (see `Runs.wait`)."""

    def __init__(self) -> None:
        self._waiter: Waiter | None = None  # nobody else pays for the thread
        self._given: Future[Download] | None = None

    def wait(self, results: Results, news: int | None, seconds: float) -> bool:
        """True: the step with these results is over, or, where there are no news to wait for, `collect` may wait."""
        if not results:
            assert news is not None
            readable([news], seconds)
            return False
        if news is None:
            return True
        if self._waiter is None:
            self._waiter = Waiter()
        if self._given is not results[0]:
            self._given = results[0]
            self._waiter.put(results)
        over = self._waiter.ended in readable([self._waiter.ended, news], seconds)
        if over:
            assert self._waiter.count() == 1
            self._given = None
        return over

    def close(self) -> None:
        """Waits for nothing any more."""
        if self._waiter is not None:
            self._waiter.close()
