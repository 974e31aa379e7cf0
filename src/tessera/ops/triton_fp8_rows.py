"""Activations in fp8, as products of tiles want them: as they are, gated, or in blocks of one expert; see `fp8.py`.

Scales lie group by group: those of neighbouring rows are neighbours in memory and a group begins on 16 bytes, as the
tensor memory accelerator fetches them. M rows a block, R routed rows, P rows of all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops import fp8
from tessera.ops.fp8 import GROUP
from tessera.ops.triton_common import chained, follow
from tessera.ops.triton_sort import Sorted

ALIGNED = 4  # scales of 16 bytes
ROWS = 32  # of a program, which takes one group of each
LARGEST, SMALLEST = tl.constexpr(fp8.LARGEST), tl.constexpr(fp8.SMALLEST)

Quantized = tuple[Tensor, Tensor]  # values [T, K], scales [T, K / group]


@dataclass(frozen=True, slots=True)
class Spread:
    """Routed rows in whole blocks of one expert each. `groups` int32 [P]: the expert of a row, -1 where there is none,
    which nobody writes or reads; `places` int32 [R]: where each routed row is (not written for those held elsewhere);
    `ends` int32 [E]: where the rows of each expert end.
    """

    rows: Quantized
    groups: Tensor
    places: Tensor
    ends: Tensor


@triton.jit
def scales_of(largest):
    """Scales of groups by their largest magnitudes [N], and their inverses."""
    largest = tl.maximum(largest, SMALLEST)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    return scale, tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), scale)


@triton.jit
def shrunk(x, inverse):
    """x [N, K] times its rows' inverse scales: what is left is to round it."""
    return tl.minimum(tl.maximum(x * inverse[:, None], -LARGEST), LARGEST)


@triton.jit
def rounded(x):
    """x [N, GROUP] in fp32 -> fp8's numbers, still in fp32, before they are rounded; the scales [N] of the groups."""
    scale, inverse = scales_of(tl.max(tl.abs(x), 1))
    return shrunk(x, inverse), scale


@triton.jit
def store(x, row, group, held, values_ptr, scales_ptr, across, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Quantises x [N, GROUP], the group `group` of the rows `row`."""
    column = group * GROUP + tl.arange(0, GROUP)
    value, scale = rounded(x)
    at = values_ptr + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(at, value.to(values_ptr.dtype.element_ty), mask=held[:, None] & (column < COLUMNS)[None, :])
    tl.store(scales_ptr + group.to(tl.int64) * across + row, scale, mask=held)


@triton.jit
def _place(ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Group and rows of a program: all groups of some rows are neighbours. By one number, of which there may be more
    than 65,535 for rows alone."""
    count: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    first = tl.program_id(0) // count * ROWS
    return tl.program_id(0) % count, first, first + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=["num_rows", "across"])
def _quantize(
    x_ptr, groups_ptr, values_ptr, scales_ptr, stride, num_rows, across,
    COLUMNS: tl.constexpr, GATED: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program: a group of some rows; GATED: of silu(x[:, :COLUMNS]) * x[:, COLUMNS:], rounded to x's dtype; GROUPED:
    but for rows of group -1."""
    follow()
    group, _, row = _place(ROWS, COLUMNS, GROUP)
    column, held = group * GROUP + tl.arange(0, GROUP), row < num_rows
    if GROUPED:
        held = tl.load(groups_ptr + row, mask=held, other=-1) >= 0
    at = x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    shown = held[:, None] & (column < COLUMNS)[None, :]
    x = tl.load(at, mask=shown, other=0.0)
    if GATED:
        gate, up = x.to(tl.float32), tl.load(at + COLUMNS, mask=shown, other=0.0)
        x = (gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)).to(x.dtype)
    store(x.to(tl.float32), row, group, held, values_ptr, scales_ptr, across, COLUMNS, GROUP)


@triton.jit(do_not_specialize=["across"])
def _spread(
    x_ptr, rows_ptr, blocks_ptr, values_ptr, scales_ptr, groups_ptr, places_ptr, stride, across,
    COLUMNS: tl.constexpr, FOLD: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program: a group of some rows of a block; those of group 0 also say where the rows are."""
    follow()
    group, top, row = _place(ROWS, COLUMNS, GROUP)
    block = blocks_ptr + top // M * 3
    expert, first, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    at = first + row % M
    held = (expert >= 0) & (at < end)
    routed = tl.load(rows_ptr + at, mask=held, other=0)
    if group == 0:
        tl.store(groups_ptr + row, tl.where(held, expert, -1))
        tl.store(places_ptr + routed, row, mask=held)
    if expert < 0:
        return
    column = group * GROUP + tl.arange(0, GROUP)
    x_at = x_ptr + (routed // FOLD).to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(x_at, mask=held[:, None] & (column < COLUMNS)[None, :], other=0.0).to(tl.float32)
    store(x, row, group, held, values_ptr, scales_ptr, across, COLUMNS, GROUP)


def empty(rows: int, columns: int, group: int, device: torch.device) -> Quantized:
    """Values and scales to be written, as they lie."""
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    across = triton.cdiv(rows, ALIGNED) * ALIGNED
    scales = torch.empty(triton.cdiv(columns, group), across, dtype=torch.float32, device=device)
    return values, scales.t()[:rows]


def _sizes(columns: int, group: int, device: torch.device) -> dict[str, object]:
    return {"COLUMNS": columns, "ROWS": ROWS, "GROUP": group, "num_warps": 4, **chained(device)}


def quantize(x: Tensor, group: int = GROUP, gated: bool = False, groups: Tensor | None = None) -> Quantized:
    """See `fp8.quantize`. Neighbours in a row are neighbours in memory. `gated`: of `fused.silu_mul(x)`. `groups`: see
    `Spread`; rows of -1 are not written."""
    rows, columns = len(x), x.shape[1] // (2 if gated else 1)
    assert x.stride(1) == 1 or columns == 1, "whole rows"
    values, scales = empty(rows, columns, group, x.device)
    if rows:
        _quantize[scales.shape[1] * triton.cdiv(rows, ROWS),](
            x, groups, values, scales, x.stride(0), rows, scales.stride(1), GATED=gated, GROUPED=groups is not None,
            **_sizes(columns, group, x.device),
        )  # fmt: skip
    return values, scales


def spread(x: Tensor, by_expert: Sorted, top_k: int, block: int, group: int = GROUP) -> Spread:
    """The rows of x [T, K] quantised where their `top_k` experts want them: `by_expert` sorts T * `top_k` routed ones
    in blocks of `block`."""
    padded, columns, ints = len(by_expert.blocks) * block, x.shape[1], {"dtype": torch.int32, "device": x.device}
    assert x.stride(1) == 1 or columns == 1, "whole rows"
    assert block % ROWS == 0, "a program takes rows of one block"
    found = Spread(
        empty(padded, columns, group, x.device), torch.empty(padded, **ints), torch.empty(len(by_expert.rows), **ints),
        by_expert.ends,
    )  # fmt: skip
    values, scales = found.rows
    _spread[scales.shape[1] * (padded // ROWS),](
        x, by_expert.rows, by_expert.blocks, values, scales, found.groups, found.places, x.stride(0), scales.stride(1),
        FOLD=top_k, M=block, **_sizes(columns, group, x.device),
    )  # fmt: skip
    return found
