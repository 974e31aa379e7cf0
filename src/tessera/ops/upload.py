"""Host arrays to the device, so that nothing waits."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array in memory that the device copies from without anybody waiting: on CPU the same memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device: on CPU the same memory, on CUDA by way of pinned memory, without waiting."""
    return staged(array, device).to(device, non_blocking=True)
