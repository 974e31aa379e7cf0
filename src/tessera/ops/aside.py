"""Work beside the main stream: what does not depend on what follows there runs in its gaps. Without CUDA: at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

MadeT = TypeVar("MadeT")


class Aside:
    """A second stream of a device; also in graphs. What is made in `begun` may be used, and given up, after `join`.

    It goes first where both have programs to start: what the main stream launches meanwhile is long, and what comes
    after that needs both. Nothing waits for the host. Memory that the second stream gave up is written again only by
    what is begun later, and that waits for all that the main stream had to do then.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Runs what is launched inside after all that was launched before, and beside what will be."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on comes after what was begun."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def run(self, make: Callable[[], MadeT]) -> Callable[[], MadeT]:
        """Begins `make`; what comes back joins, and gives what was made."""
        with self.begun():
            made = make()

        def joined() -> MadeT:
            self.join()
            return made

        return joined
