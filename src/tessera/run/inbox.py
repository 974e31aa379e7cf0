"""The queue in front of the step loop: any thread posts, the loop drains. A closed one refuses, so nothing is lost."""

from __future__ import annotations

import threading

from tessera.core.messages import Inbound
from tessera.plan.handoff import Wire
from tessera.run.mailbox import Mailbox
from tessera.run.poster import Broke, Order
from tessera.run.profiling import Traced

# Of the front; of other servers and of ranks about them; for ranks; of ranks about profiles.
Message = Inbound | Wire | Order | Broke | Traced


class Inbox:
    """Messages for the step loop, in the order in which they were posted."""

    def __init__(self) -> None:
        self._box: Mailbox[Message] = Mailbox()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def there(self) -> int:
        """A file that is readable when something was posted since it was drained."""
        return self._box.there

    def post(self, message: Message) -> bool:
        """Queues a message; False when the inbox is closed and the message was not taken."""
        with self._lock:
            if self._closed:
                return False
            self._box.put(message)
            return True

    def drain(self) -> list[Message]:
        """Everything queued. Does not block: see `there`."""
        return self._box.take()

    def close(self) -> list[Message]:
        """Refuses all later posts and returns what was still queued."""
        with self._lock:
            self._closed = True
        return self.drain()
