"""A part of a step as device tensors: segments, the gather of input tokens, and which rows of the output need logits.

A few vectorised numpy operations and two host-to-device copies (the segments, and the packed indices here); nothing
waits for the device. T tokens, S ranges, N drawn positions, M prompt positions that need logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.ops.segments import Segments, make_segments
from tessera.plan.step import NO_INTS, Ints, Part, Step
from tessera.run.host import upload_columns
from tessera.run.table import RowTable


@dataclass(frozen=True, slots=True)
class Wanted:
    """Positions that need logits. `index`: row among the T outputs; `rows`: row of the row table; `positions`: of the
    token that the logits predict. The host's numbers stand beside the device's. `counts`: how many each DP rank has.
    """

    index: Tensor
    rows: Tensor
    positions: Tensor
    host_rows: Ints
    host_positions: Ints
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.host_rows)


@dataclass(frozen=True, slots=True)
class Batch:
    """`segments` of the ranges, `table_rows` [S] where they sit, `draws` (N) and `prompts` (M).

    `counts`: tokens of each DP rank.
    """

    segments: Segments
    table_rows: Tensor
    draws: Wanted
    prompts: Wanted
    counts: tuple[int, ...]

    def input_tokens(self, tokens: Tensor) -> Tensor:
        """The T input tokens, gathered from the token table."""
        return tokens[self.table_rows[self.segments.rows], self.segments.positions]


def make_batch(step: Step, dp_rank: int, table: RowTable, page_size: int, device: torch.device) -> Batch | None:
    """The tensors of one DP rank's part, whose change the table has taken already.

    A rank with no ranges has a batch of no rows, since others may wait for it; None when nobody has any.
    """
    if not step.num_tokens:
        return None
    part = step.parts[dp_rank]
    rows = part.rows
    ends = part.starts + part.lengths
    reach = -(-int(ends.max(initial=0)) // page_size)
    segments = make_segments(part.starts, part.lengths, table.pages[rows, :reach], table.slots[rows], page_size, device)
    last = np.cumsum(part.lengths, dtype=np.int32) - 1
    drawn = part.samples
    prompt = _prompt_columns(part, last, ends)
    columns = (rows, last[drawn], rows[drawn], ends[drawn], *prompt)
    table_rows, *device_columns = upload_columns(columns, device)
    num_drawn = tuple(int(np.count_nonzero(p.samples)) for p in step.parts)
    num_scored = tuple(int(p.num_logits.sum()) - n for p, n in zip(step.parts, num_drawn, strict=True))
    draws = Wanted(*device_columns[:3], host_rows=columns[2], host_positions=columns[3], counts=num_drawn)
    prompts = Wanted(*device_columns[3:], host_rows=prompt[1], host_positions=prompt[2], counts=num_scored)
    return Batch(segments, table_rows, draws, prompts, tuple(p.num_tokens for p in step.parts))


def _prompt_columns(part: Part, last: Ints, ends: Ints) -> tuple[Ints, Ints, Ints]:
    """(index, row, predicted position) of every position that needs logits and is not drawn from."""
    counts = part.num_logits - part.samples
    if not counts.any():
        return NO_INTS, NO_INTS, NO_INTS
    total = int(counts.sum())
    # Counted back from the range's last token, or from the one before it where that one is drawn from.
    back = np.repeat(np.cumsum(counts), counts) - np.arange(total) - 1 + np.repeat(part.samples, counts)
    index = np.repeat(last, counts) - back
    positions = np.repeat(ends, counts) - back
    return index.astype(np.int32), np.repeat(part.rows, counts), positions.astype(np.int32)
