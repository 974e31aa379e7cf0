"""Acts that ranks perform together between steps; above all how a size of steps is recorded on all ranks, or on none.

A recording is told to all ranks in order with the steps, one act after the other, and none begins before the last is
over on all: a rehearsal without the others, so that a rank without memory for the step leaves nobody waiting; a run
together; the recording itself, during which nothing runs on a device. A rank alone has nobody to meet. When a rank says
that memory is missing, all drop the size. Steps that run for their time (`trials.py`) are rehearsed and meet likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from tessera.core.errors import CapacityError
from tessera.plan.step import Step
from tessera.run.graphs import Size

Act = Literal["rehearse", "meet", "record", "drop"]
TOGETHER: tuple[Act, ...] = ("rehearse", "meet", "record")
ALONE: tuple[Act, ...] = ("rehearse", "record")
GUARDED = ("rehearse", "record")  # acts that may fail on one rank alone


def perform(acts: Mapping[str, Callable[[Any], None]], act: Act, of: Size | Step) -> str:
    """One of the `acts` that a rank knows: what memory is missing; empty when it went well."""
    try:
        acts[act](of)
    except torch.OutOfMemoryError as error:
        if act not in GUARDED:
            raise
        return missing(error)
    return ""


def missing(error: BaseException) -> str:
    """What an allocator says: how much was asked for, how much there is and was left."""
    said = str(error).removeprefix("CUDA out of memory. ").split(". ")
    return ". ".join(said[:2]).rstrip(".").replace("\n", " ")


def record(acts: tuple[Act, ...], tell: Callable[[Act], Mapping[int, str]]) -> None:
    """Records a size, by these acts. `tell`: has all ranks perform an act; what memory each lacks, by rank.

    Raises `CapacityError` when one had none: then no rank has the size recorded.
    """
    for act in acts:
        try:
            each_performs(tell(act))
        except CapacityError:
            if act == "record":
                tell("drop")
            raise


def each_performs(said: Mapping[int, str]) -> None:
    """Raises `CapacityError` when a rank had no memory for an act. `said`: what each lacked, by rank."""
    lacking = {rank: why for rank, why in sorted(said.items()) if why}
    if lacking:
        raise CapacityError("; ".join(f"rank {rank}: {why}" for rank, why in lacking.items()))


def called(of: Size | Step) -> str:
    """A size or a dry step, for people."""
    return f"a dry step of {of.num_tokens} tokens" if isinstance(of, Step) else f"steps of {of}"
