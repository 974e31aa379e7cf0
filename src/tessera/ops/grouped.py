"""The experts' MLPs as two grouped products of PyTorch's library (`torch._grouped_mm`), between a sort and a sum.

T tokens, k experts a token, R = T * k routed rows, E experts, H hidden, I intermediate. Nothing of a batch is read on
the host (on CUDA: bf16, compute capability 9.0 on), so steps can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def experts_of(silu_mul: Callable[[Tensor], Tensor], combine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op `experts` with these versions of what is between and after its products; see `moe.experts_reference`."""

    def experts(
        x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, unrounded: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """See `moe.experts_reference`; always rounded, for these products give the dtype of what they are given."""
        assert not unrounded, "refused at start"
        if not ids.numel() or not len(w13):
            return torch.zeros_like(x, dtype=dtype)
        order, ends = by_expert(ids, len(w13))
        rows = x[order // ids.shape[1]]
        h = silu_mul(torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends))
        y = torch._grouped_mm(h, w2.transpose(1, 2), offs=ends)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return combine(y, ids.contiguous(), weights.contiguous(), places, dtype=dtype)

    return experts


def by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Routed rows of ids [T, k] in order of their experts, those of -1 last [R]; where each expert's rows end [E]."""
    keys = torch.where(ids < 0, num_experts, ids).flatten()
    chosen, order = keys.sort(stable=True)
    return order, torch.searchsorted(chosen, torch.arange(num_experts, device=ids.device), right=True, out_int32=True)


def padded(rows: Tensor, blocks: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole blocks of M rows in all, from `triton_sort.Sorted`: the routed row of each [M] (0 where there is none), its
    expert int32 [M] (-1: none), and where each routed row is int32 [R] (not written for those held elsewhere)."""
    expert, first, end = blocks[:, :, None].unbind(1)
    at = first + torch.arange(block, device=rows.device)
    held = (expert >= 0) & (at < end)
    own = torch.where(held, rows[torch.where(held, at, 0)], 0).flatten()
    groups = torch.where(held, expert, -1).int().flatten()
    places = torch.empty(len(rows) + 1, dtype=torch.int32, device=rows.device)
    targets = torch.where(held.flatten(), own, len(rows))  # padding goes to one place behind them
    places[targets.long()] = torch.arange(len(own), dtype=torch.int32, device=rows.device)
    return own, groups, places[:-1]
