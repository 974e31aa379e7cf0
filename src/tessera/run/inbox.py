"""The queue in front of the step loop: any thread posts, the loop drains. A closed one refuses, so nothing is lost."""

from __future__ import annotations

import queue
import threading

from tessera.core.messages import Inbound
from tessera.plan.handoff import Wire
from tessera.run.poster import Broke, Order
from tessera.run.profiling import Traced

# Of the front; of other servers and of ranks about them; for ranks; of ranks about profiles.
Message = Inbound | Wire | Order | Broke | Traced


class Inbox:
    """Messages for the step loop, in the order in which they were posted."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def post(self, message: Message) -> bool:
        """Queues a message; False when the inbox is closed and the message was not taken."""
        with self._lock:
            if self._closed:
                return False
            self._queue.put(message)
            return True

    def drain(self, timeout: float = 0.0) -> list[Message]:
        """Everything queued. Blocks, without spinning, up to `timeout` seconds for the first message."""
        messages = []
        try:
            if timeout > 0 and self._queue.empty():
                messages.append(self._queue.get(timeout=timeout))
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return messages

    def close(self) -> list[Message]:
        """Refuses all later posts and returns what was still queued."""
        with self._lock:
            self._closed = True
        return self.drain()
