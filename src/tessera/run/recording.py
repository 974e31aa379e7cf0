"""How a size of steps is recorded on all ranks, or on none.

A recording is told to all ranks in order with the steps, one act after the other, and none begins before the last is
over on all: a rehearsal without the others, so that a rank without memory for the step leaves nobody waiting; a run
together; the recording itself, during which nothing runs on a device. A rank alone has nobody to meet. When a rank says
that memory is missing, all drop the size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from tessera.core.errors import CapacityError
from tessera.run.graphs import Graphs, Size

Act = Literal["rehearse", "meet", "record", "drop"]
TOGETHER: tuple[Act, ...] = ("rehearse", "meet", "record")
ALONE: tuple[Act, ...] = ("rehearse", "record")
GUARDED = ("rehearse", "record")  # acts that may fail on one rank alone


def perform(graphs: Graphs, act: Act, size: Size) -> str:
    """One act on one rank: what memory is missing; empty when it went well."""
    acts: dict[Act, Callable[[Size], None]] = {
        "rehearse": graphs.rehearse, "meet": graphs.meet, "record": graphs.record, "drop": graphs.drop,
    }  # fmt: skip
    try:
        acts[act](size)
    except torch.OutOfMemoryError as error:
        if act not in GUARDED:
            raise
        return missing(error)
    return ""


def missing(error: BaseException) -> str:
    """What an allocator says: how much was asked for, how much there is and was left."""
    said = str(error).removeprefix("CUDA out of memory. ").split(". ")
    return ". ".join(said[:2]).rstrip(".").replace("\n", " ")


def record(size: Size, acts: tuple[Act, ...], tell: Callable[[Act], Mapping[int, str]]) -> None:
    """Records a size. `tell`: has all ranks perform an act; what memory each lacks, by rank.

    Raises `CapacityError` when one had none: then no rank has the size recorded.
    """
    for act in acts:
        lacking = {rank: why for rank, why in sorted(tell(act).items()) if why}
        if lacking:
            if act == "record":
                tell("drop")
            raise CapacityError("; ".join(f"rank {rank}: {why}" for rank, why in lacking.items()))
