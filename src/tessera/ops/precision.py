"""Which dtype an op computes in."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The wider of float32 and `dtype`: what "in fp32" means in the mathematics, so that float64 runs stay float64."""
    return torch.promote_types(dtype, torch.float32)
