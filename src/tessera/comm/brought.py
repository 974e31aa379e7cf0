"""The result of a collective from what its ranks brought, for ranks that see each other's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tessera.comm.base import Dtype, ordered_sum

Brought = Sequence[Sequence[Tensor]]  # the parts of each rank of a group, in the order of ranks
Combine = Callable[[Brought], Tensor]


def summed(brought: Brought, keep: tuple[int, int, int] | None = None, dtype: Dtype = None) -> Tensor:
    """Of all, or of what to `keep` (dim, start, length); a new tensor."""
    parts = [part if keep is None else part.narrow(*keep) for own in brought for part in own]
    return ordered_sum(parts, dtype) if len(parts) > 1 else parts[0].to(dtype or parts[0].dtype, copy=True)


def joined(brought: Brought, dim: int) -> Tensor:
    """The one part of each, side by side."""
    return torch.cat([part for (part,) in brought], dim)


def picked(brought: Brought, at: int, received: Sequence[int] | None) -> Tensor:
    """The pieces for coordinate `at`, one below the other."""
    came = [pieces[at] for pieces in brought]
    lengths = [len(piece) for piece in came]
    assert received is None or lengths == list(received), f"{lengths} rows came, not {received}"
    return torch.cat(came)
