"""What layers are: generators that wait on the wire by `yield`; and who runs them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from torch import Tensor

from tessera.comm.base import Handle

Result = TypeVar("Result")
Waits = Generator[Handle, Tensor, Result]  # yields what it waits for, is sent the tensor, returns a Result


def drain(waits: Waits[Result]) -> Result:
    """Runs a generator alone: waits where it waits."""
    (result,) = interleave([waits])
    return result


def interleave(runs: Sequence[Waits[Result]]) -> list[Result]:
    """Runs generators side by side, taking turns: while what one waits for is on the wire, the others compute.

    Each stage of one runs before the same stage of those after it, which may build on what it wrote. So all must have
    as many stages; else one would get ahead of what it builds on. All ranks take the same turns, so collectives meet in
    the same order everywhere.

    Raises `RuntimeError` where some end before the others.
    """
    results: list[Result] = []
    waiting: list[Handle | None] = [None] * len(runs)
    while len(results) < len(runs):
        for nth, run in enumerate(runs):
            handle = waiting[nth]
            try:
                waiting[nth] = next(run) if handle is None else run.send(handle.wait())
            except StopIteration as end:
                results.append(end.value)
        if len(results) not in (0, len(runs)):
            raise RuntimeError(f"{len(results)} of {len(runs)} batches side by side ended a stage before the others")
    return results
