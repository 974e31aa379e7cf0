"""A part of a step as device tensors: segments, the gather of input tokens, and which rows of the output need logits.

A few vectorised numpy operations and two host-to-device copies (the segments, and the packed indices here); nothing
waits for the device. T tokens, S ranges, N drawn positions, M prompt positions that need logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tessera.ops.segments import Segments, make_segments
from tessera.ops.upload import upload_columns
from tessera.plan.step import NO_INTS, Ints, Part, Step
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


class Input(NamedTuple):
    """What the layers get: `tokens` [T] of the ranges of `segments`, and how many tokens each DP rank has."""

    tokens: Tensor
    segments: Segments
    counts: tuple[int, ...]


class Model(Protocol):
    """What a rank needs of a model: `forward` runs the layers, the others the head.

    `inputs`: a step's ranges, or those of its two halves, of which the first is ahead at every stage. `counts`: how
    many rows each DP rank brings; a rank without any takes part all the same.
    """

    vocab_size: int

    def forward(self, inputs: tuple[Input, ...], caches: dict[str, Tensor]) -> Tensor:
        """T tokens in all -> hidden states after the final norm [T, hidden]."""

    def logits(self, hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
        """[N, hidden] -> [N, vocab], fp32 or wider."""

    def narrow_logits(self, hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
        """[N, hidden] -> [N, G, W] in the parts that they come in and the dtype that they are computed in."""


@dataclass(frozen=True, slots=True)
class Half:
    """Ranges that run together: all of a step, or a half of it. `table_rows` [S]: where they sit."""

    segments: Segments
    table_rows: Tensor
    counts: tuple[int, ...]

    def input(self, tokens: Tensor) -> Input:
        """With the tokens that it computes, gathered from the token table."""
        return Input(tokens[self.table_rows[self.segments.rows], self.segments.positions], self.segments, self.counts)


@dataclass(frozen=True, slots=True)
class Batch:
    """The ranges, whole or in `halves`; `draws` (N) and `prompts` (M) of all of them."""

    halves: tuple[Half, ...]
    draws: Wanted
    prompts: Wanted

    def inputs(self, tokens: Tensor) -> tuple[Input, ...]:
        """What the layers get, with the tokens from the token table."""
        return tuple(half.input(tokens) for half in self.halves)


def make_batch(step: Step, dp_rank: int, table: RowTable, page_size: int, device: torch.device) -> Batch | None:
    """The tensors of one DP rank's part, whose change the table has taken already.

    A rank with no ranges has a batch of no rows, since others may wait for it; None when nobody has any.
    """
    if not step.num_tokens:
        return None
    part = step.parts[dp_rank]
    rows, ends = part.rows, part.starts + part.lengths
    last = np.cumsum(part.lengths, dtype=np.int32) - 1
    drawn = part.samples
    prompt = _prompt_columns(part, last, ends)
    columns = (last[drawn], rows[drawn], ends[drawn], *prompt)
    pieces = [half.parts[dp_rank] for half in step.halves]
    uploaded = upload_columns((*columns, *(piece.rows for piece in pieces)), device)
    device_columns, table_rows = uploaded[: len(columns)], uploaded[len(columns) :]
    halves = tuple(
        Half(_segments(piece, table, page_size, device), at, tuple(p.num_tokens for p in half.parts))
        for piece, at, half in zip(pieces, table_rows, step.halves, strict=True)
    )
    num_drawn = tuple(int(np.count_nonzero(p.samples)) for p in step.parts)
    num_scored = tuple(int(p.num_logits.sum()) - n for p, n in zip(step.parts, num_drawn, strict=True))
    draws = Wanted(*device_columns[:3], host_rows=columns[1], host_positions=columns[2], counts=num_drawn)
    prompts = Wanted(*device_columns[3:], host_rows=prompt[1], host_positions=prompt[2], counts=num_scored)
    return Batch(halves, draws, prompts)


def drawn_of(step: Step, dp_rank: int, places: Ints, device: torch.device | None) -> Wanted:
    """The drawn positions of a part, whose ranges are at `places`. `device` None: only the host needs them."""
    part = step.parts[dp_rank]
    columns = (places, part.rows[part.samples], (part.starts + part.lengths)[part.samples])
    on_device = upload_columns(columns, device) if device is not None else [torch.from_numpy(c) for c in columns]
    counts = tuple(int(np.count_nonzero(p.samples)) for p in step.parts)
    return Wanted(*on_device, host_rows=columns[1], host_positions=columns[2], counts=counts)


def _segments(part: Part, table: RowTable, page_size: int, device: torch.device) -> Segments:
    reach = -(-int((part.starts + part.lengths).max(initial=0)) // page_size)
    pages, slots = table.pages[part.rows, :reach], table.slots[part.rows]
    return make_segments(part.starts, part.lengths, pages, slots, page_size, device)


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
