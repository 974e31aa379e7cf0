"""`ops/greedy.py` in two short kernels: many programs a row, of parts wherever they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.precision import wide
from tessera.ops.triton_common import chained, follow

BLOCK = 4096  # logits of a program
WARPS = 4


@triton.jit(do_not_specialize=["vocab_size"])
def _best_of_blocks(
    parts, values, tokens, width, vocab_size, row_stride, part_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (row, block of a part, part): the best of its logits, to values and tokens [N, G * blocks]."""
    follow()
    row, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = block * BLOCK + tl.arange(0, BLOCK)
    token = part * width + column
    at = parts + row.to(tl.int64) * row_stride + part.to(tl.int64) * part_stride
    x = tl.load(at + column, mask=(column < width) & (token < vocab_size), other=float("-inf"))
    best, index = tl.max(x.to(values.dtype.element_ty), 0, return_indices=True)
    to = (row * tl.num_programs(2) + part) * tl.num_programs(1) + block
    tl.store(values + to, best)
    tl.store(tokens + to, part * width + block * BLOCK + index)


@triton.jit
def _best_of_row(values, tokens, out, NUM: tl.constexpr, PADDED: tl.constexpr):
    """Program (row): the first of the best."""
    follow()
    row, nth = tl.program_id(0), tl.arange(0, PADDED)
    value = tl.load(values + row * NUM + nth, mask=nth < NUM, other=float("-inf"))
    _, index = tl.max(value, 0, return_indices=True)
    tl.store(out + row, tl.load(tokens + row * NUM + index).to(tl.int64))


def greedy(parts: Tensor, vocab_size: int) -> Tensor:
    """See `greedy.greedy`."""
    num_rows, num_parts, width = parts.shape
    assert parts.stride(2) == 1, "neighbours in a row"
    out = torch.empty(num_rows, dtype=torch.int64, device=parts.device)
    if num_rows == 0:
        return out
    blocks = triton.cdiv(width, BLOCK)
    values = parts.new_empty(num_rows, num_parts * blocks, dtype=wide(parts.dtype))
    tokens = torch.empty(values.shape, dtype=torch.int32, device=parts.device)
    _best_of_blocks[num_rows, blocks, num_parts](
        parts, values, tokens, width, vocab_size, *parts.stride()[:2], BLOCK=BLOCK, num_warps=WARPS,
        **chained(parts.device),
    )  # fmt: skip
    num = num_parts * blocks
    _best_of_row[(num_rows,)](
        values, tokens, out, NUM=num, PADDED=triton.next_power_of_2(num), num_warps=1, **chained(parts.device)
    )  # fmt: skip
    return out
