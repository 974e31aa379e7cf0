"""The engine without text: messages in, messages out. What `tessera.Engine` and the server's engine process wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tessera.core.messages import Inbound, Outbound, Outputs, Ready, Submit
from tessera.run.inbox import Inbox
from tessera.run.loop import failures

if TYPE_CHECKING:
    from tessera.core.config import Config


class EngineCore:
    """Builds everything of one instance from a resolved configuration: spec, weights, pools, planner, runner, loop.

    `sink(message)` is called from the thread in `run()`: `Ready` first, then `Outputs`, `StepReport`, `Tick`, and
    `Fatal` if it fails. `post()` may be called from any thread, also before `run()`.
    """

    def __init__(self, config: Config, sink: Callable[[Outbound], None]) -> None:
        self.config = config
        self._sink = sink
        self._inbox = Inbox()
        self._loop = build_loop(config, self._inbox, sink)

    def post(self, message: Inbound) -> None:
        """Hands a message to the loop. A `Submit` after the end is answered with an error output at once."""
        if not self._inbox.post(message) and isinstance(message, Submit):
            choices = [(message.request_id, choice) for choice in range(message.n)]
            self._sink(Outputs(failures(choices, "the engine has ended")))

    def run(self) -> None:
        """Blocks until `Stop` has been honoured or a step has failed. Never raises an `Exception`."""
        self._loop.run(Ready(self.info()))

    @property
    def last_tick(self) -> float:
        """`time.monotonic()` at the loop's last turn, for health."""
        return self._loop.last_tick

    def info(self) -> dict[str, object]:
        """The resolved configuration with its decisions, and the sizes of what was built."""
        return {}
