"""`ops/expand.py` as one Triton kernel, beside a gather of the page tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.expand import Columns, Expanded
from tessera.ops.upload import room

BLOCK = 128


@triton.jit(do_not_specialize=["num_segments", "num_tokens", "out_row", "steps"])
def _expand_kernel(
    table_rows, starts, cu, tokens, pages, out, tokens_stride, pages_stride, num_segments, num_tokens, out_row, steps,
    page_size, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_tokens
    low = tl.zeros([BLOCK], tl.int32)  # the first range whose end lies behind the token
    high = low + num_segments
    for _ in range(steps):
        middle = (low + high) // 2
        ends = tl.load(cu + middle + 1, valid & (low < high), 0)
        right = (ends <= at) & (low < high)
        high = tl.where(right | (low >= high), high, middle)
        low = tl.where(right, middle + 1, low)
    inside = valid & (low < num_segments)
    row = tl.minimum(low, num_segments - 1)
    position = tl.where(inside, tl.load(starts + row, inside, 0) + at - tl.load(cu + row, inside, 0), 0)
    table_row = tl.load(table_rows + row, inside, 0).to(tl.int64)
    token = tl.load(tokens + table_row * tokens_stride + position, inside, 0)
    page = tl.load(pages + table_row * pages_stride + position // page_size, inside, 0)
    tl.store(out + at, token, valid)
    tl.store(out + out_row + at, position, valid)
    tl.store(out + 2 * out_row + at, row, valid)
    tl.store(out + 3 * out_row + at, page, valid)
    tl.store(out + 4 * out_row + at, position % page_size, valid)


def expand(columns: Columns, num_tokens: int, tokens: Tensor, pages: Tensor, page_size: int) -> Expanded:
    """See `expand_reference`."""
    out = torch.empty(5, room(num_tokens), dtype=torch.int32, device=tokens.device)
    num_segments = len(columns.starts)
    _expand_kernel[(triton.cdiv(num_tokens, BLOCK),)](
        columns.table_rows, columns.starts, columns.cu_lengths, tokens, pages, out,
        tokens.stride(0), pages.stride(0), num_segments, num_tokens, out.stride(0), num_segments.bit_length(),
        page_size, BLOCK,
    )  # fmt: skip
    return Expanded(*out[:, :num_tokens].unbind(), pages.index_select(0, columns.table_rows))
