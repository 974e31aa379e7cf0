"""From the ranges of a step, as columns on the device, to what every token needs to know. S ranges, T tokens, P pages.

The plain twin of `triton_expand.py`. Nothing here knows on the host how long a range is, so that the same launches
serve other ranges (CUDA graphs): S and T are padded, ranges may be empty, tokens past the last range belong to none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tessera.ops.upload import room


class Columns(NamedTuple):
    """One entry per range, int32, views of one buffer. `table_rows`: rows of the row table, the scratch row for
    padding; `cu_lengths` has S + 1; `draw_rows`: where a drawn token goes, the scratch row where none is."""

    table_rows: Tensor
    starts: Tensor
    lengths: Tensor
    slots: Tensor
    draw_rows: Tensor
    cu_lengths: Tensor

    @staticmethod
    def places(num_segments: int) -> list[slice]:
        """Where each lies in a buffer of `size(S)` numbers."""
        each = room(num_segments)
        return [slice(i * each, i * each + num_segments + (i == 5)) for i in range(6)]

    @staticmethod
    def size(num_segments: int) -> int:
        """Numbers of a buffer."""
        return 5 * room(num_segments) + room(num_segments + 1)

    @staticmethod
    def split(packed: Tensor, num_segments: int) -> Columns:
        """Views of a buffer."""
        return Columns(*(packed[place] for place in Columns.places(num_segments)))


class Expanded(NamedTuple):
    """Per token, int32 [T]; and `page_table` [S, P]. A token of no range is token 0 at position 0 and is written to
    scratch page 0."""

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    write_page: Tensor
    write_offset: Tensor
    page_table: Tensor


def expand_reference(columns: Columns, num_tokens: int, tokens: Tensor, pages: Tensor, page_size: int) -> Expanded:
    """`tokens` [rows + 1, context + 1] and `pages` [rows + 1, P]: the row table on the device, its last row scratch."""
    at = torch.arange(num_tokens, dtype=torch.int32, device=tokens.device)
    cu = columns.cu_lengths
    rows = torch.searchsorted(cu[1:], at, right=True, out_int32=True)
    inside = rows < len(columns.starts)
    rows = rows.clamp(max=len(columns.starts) - 1)
    positions = torch.where(inside, columns.starts[rows] + at - cu[rows], 0)
    table = pages[columns.table_rows]
    return Expanded(
        torch.where(inside, tokens[columns.table_rows[rows], positions], 0),
        positions,
        rows,
        torch.where(inside, table[rows, positions // page_size], 0),
        torch.where(inside, positions % page_size, 0),
        table,
    )
