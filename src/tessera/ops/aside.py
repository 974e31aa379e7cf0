"""Work beside the main stream: what does not depend on what follows there runs in its gaps. Without CUDA: at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

MadeT = TypeVar("MadeT")


class Aside:
    """A second stream of a device; also in graphs.

    It goes first where both have programs to start: what the main stream launches meanwhile is long, and what comes
    after that needs both. Nothing waits for the host. Memory that the second stream gave up is written again only by
    what is begun later, and that waits for all that the main stream had to do then.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def run(self, make: Callable[[], MadeT]) -> Callable[[], MadeT]:
        """Runs what `make` launches after all that was launched before, and beside what will be.

        What comes back gives what was made, and has what is launched from then on come after it: not before may it be
        used, or given up.
        """
        stream = self._stream
        if stream is None:
            made = make()
            return lambda: made
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            made = make()

        def joined() -> MadeT:
            torch.cuda.current_stream().wait_stream(stream)
            return made

        return joined
