"""Which dtype an op computes in."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The wider of float32 and `dtype`: what "in fp32" means in the mathematics, so that float64 runs stay float64."""
    return torch.promote_types(dtype, torch.float32)


def kept_in(operands: torch.dtype, unrounded: bool, asked: torch.dtype | None = None) -> torch.dtype:
    """In which dtype a product, or a sum of such, is kept: as asked, else that of its operands, or `wide`."""
    return asked or (wide(operands) if unrounded else operands)
