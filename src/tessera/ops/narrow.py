"""Numbers in dtypes of one byte: how they get there, and how they are moved where a device knows no such dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`. What lies beyond the largest number of an fp8 dtype becomes that number, as the field's kernels do
    it; a plain cast makes NaN or infinity of it, by the version of torch."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def picked(x: Tensor, *index: Tensor) -> Tensor:
    """`x[index]`."""
    return movable(x)[index].view(x.dtype)


def movable(x: Tensor) -> Tensor:
    """A view of x whose elements every device moves and fills with zeros: bytes, where an element is one."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
