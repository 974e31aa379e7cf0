"""Host arrays to the device, so that nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array in memory that the device copies from without anybody waiting: on CPU the same memory.

    numpy copies it: `Tensor.pin_memory` copies by a team of threads from 32,768 elements on, and where the cores are
    busy that has taken 20 ms.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    pinned = torch.empty_like(tensor, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device: on CPU the same memory, on CUDA by way of pinned memory, without waiting."""
    return staged(array, device).to(device, non_blocking=True)


ALIGNED = 4  # int32 numbers: 16 bytes, which is what Triton compiles kernels for or not


def room(length: int) -> int:
    """What a column of int32 takes among others, so that the next one begins at 16 bytes: a kernel is compiled for
    which of its pointers do, and a column at any place would be another kernel in another step."""
    return -(-length // ALIGNED) * ALIGNED


def upload_columns(columns: Sequence[NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Int32 columns on the device, by one copy. Each begins at 16 bytes."""
    lengths, rooms = [len(c) for c in columns], [room(len(c)) for c in columns]
    packed, at = np.zeros(sum(rooms), np.int32), 0
    for column, length, taken in zip(columns, lengths, rooms, strict=True):
        packed[at : at + length] = column
        at += taken
    parts = upload(packed, device).split(rooms)
    return tuple(part[:length] for part, length in zip(parts, lengths, strict=True))
