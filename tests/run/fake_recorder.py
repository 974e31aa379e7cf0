"""Stands in for CUDA graphs on a CPU, and lacks memory where it is told to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.comm.rehearsal import Rehearsing

Stage = Callable[[], tuple[Tensor, Tensor]]
LACKING = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 1.00 GiB free. Of it"


class FakeRecorder:
    """Computes a stage anew into the same tensors. As on a device nobody talks to others while something is captured.

    `lacks`: "rehearse", "meet" or "record", that finds no memory, in the middle of what is run, for `smallest` ranges
    and more.
    """

    def __init__(self, comm: Rehearsing, lacks: str = "", smallest: int = 1) -> None:
        self._comm, self._lacks, self._smallest, self._warmed = comm, lacks, smallest, 0
        self.captured: list[int] = []
        self.replayed = 0

    def warm(self, stage: Stage) -> None:
        self._warmed += 1
        self._run("rehearse" if self._warmed % 2 else "meet", stage)

    def capture(self, stage: Stage) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        with self._comm.alone():
            found = self._run("record", stage)
        self.captured.append(len(found[0]))

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(found, stage(), strict=True):
                old.copy_(new)

        return found, replay

    def _run(self, act: str, stage: Stage) -> tuple[Tensor, Tensor]:
        found = stage()
        if act == self._lacks and len(found[0]) >= self._smallest:
            self._warmed = 0
            raise torch.OutOfMemoryError(LACKING)
        return found
