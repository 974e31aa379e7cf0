"""Segments: what every op and layer gets of a step. A segment is a range of tokens of one sequence.

Shape suffixes: S segments, T tokens, P pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.ops.upload import upload_columns

Ints = NDArray[np.int32]
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Segments:
    """Device tensors (int32) beside the same small numbers on the host, so that nothing synchronises.

    Segment s computes tokens `starts[s] .. starts[s] + lengths[s] - 1` of a sequence whose pages are `page_table[s]`
    and whose recurrent state is slot `slots[s]`; its rows of the step are `cu_lengths[s] .. cu_lengths[s + 1] - 1`.

    What is launched once and replayed for other ranges (a CUDA graph) has no host numbers: `host_starts` and
    `host_lengths` are empty, `max_length` bounds what may come; S and T are padded, by segments that may
    be empty, have page table and slot 0 and start at 0, and by tokens of no segment.
    """

    cu_lengths: Tensor  # [S + 1]
    starts: Tensor  # [S]
    lengths: Tensor  # [S], each at least 1 (without host numbers: 0)
    slots: Tensor  # [S]
    page_table: Tensor  # [S, P]
    positions: Tensor  # [T] position in the sequence
    rows: Tensor  # [T] segment of each token
    write_page: Tensor  # [T] page and offset in it where the token's keys and values go
    write_offset: Tensor  # [T]
    page_size: int
    host_starts: Ints
    host_lengths: Ints
    max_length: int
    _made: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.lengths)

    @property
    def known(self) -> bool:
        """The host knows the numbers too."""
        return len(self.host_lengths) == len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.positions)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.positions.device

    def once(self, key: Hashable, make: Callable[[], V]) -> V:
        """`make()`, made by the first layer that asks and kept for the other layers of the step."""
        if key not in self._made:
            self._made[key] = make()
        return cast(V, self._made[key])

    def tokens_of(self, first: int, last: int) -> slice:
        """Rows of the tokens of segments `first .. last - 1`."""
        before = int(self.host_lengths[:first].sum())
        return slice(before, before + int(self.host_lengths[first:last].sum()))

    def part(self, first: int, last: int) -> Segments:
        """Segments `first .. last - 1` alone (views; nothing is copied from the host).

        For a caller that gives long and short ranges different forms of an op.
        """
        if (first, last) == (0, self.num_segments):
            return self
        return self.once(("part", first, last), lambda: self._cut(first, last))

    def _cut(self, first: int, last: int) -> Segments:
        tokens = self.tokens_of(first, last)
        starts, lengths = self.host_starts[first:last], self.host_lengths[first:last]
        return Segments(
            cu_lengths=self.cu_lengths[first : last + 1] - tokens.start,
            starts=self.starts[first:last],
            lengths=self.lengths[first:last],
            slots=self.slots[first:last],
            page_table=self.page_table[first:last],
            positions=self.positions[tokens],
            rows=self.rows[tokens] - first,
            write_page=self.write_page[tokens],
            write_offset=self.write_offset[tokens],
            page_size=self.page_size,
            host_starts=starts,
            host_lengths=lengths,
            max_length=int(lengths.max(initial=0)),
        )


def make_segments(
    starts: Ints, lengths: Ints, page_tables: Ints, slots: Ints, page_size: int, device: torch.device | str = "cpu"
) -> Segments:
    """Builds `Segments` from host arrays: `starts`, `lengths`, `slots` [S], `page_tables` [S, >= pages of each].

    A slot of -1 (a model without recurrent state) becomes the scratch slot 0. A padding segment has page table 0 and
    slot 0, so that it writes scratch only. One host-to-device copy.
    """
    starts = np.asarray(starts, np.int32)
    lengths = np.asarray(lengths, np.int32)
    assert (lengths > 0).all(), f"an empty range is no segment: lengths {lengths.tolist()}"
    last = int((starts + lengths).max(initial=0))
    num_pages = -(-last // page_size)
    tables = np.asarray(page_tables, np.int32)[:, :num_pages]
    assert tables.shape[1] == num_pages, f"page tables of {tables.shape[1]} pages do not reach token {last - 1}"
    cu_lengths = np.zeros(len(starts) + 1, np.int32)
    np.cumsum(lengths, out=cu_lengths[1:])
    rows = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
    positions = np.arange(len(rows), dtype=np.int32) + np.repeat(starts - cu_lengths[:-1], lengths)
    write_page = tables[rows, positions // page_size]
    columns = (cu_lengths, starts, lengths, np.maximum(np.asarray(slots, np.int32), 0), tables.ravel())
    columns += (positions, rows, write_page, positions % page_size)
    views = upload_columns(columns, torch.device(device))
    return Segments(
        cu_lengths=views[0],
        starts=views[1],
        lengths=views[2],
        slots=views[3],
        page_table=views[4].view(tables.shape),
        positions=views[5],
        rows=views[6],
        write_page=views[7],
        write_offset=views[8],
        page_size=page_size,
        host_starts=starts,
        host_lengths=lengths,
        max_length=int(lengths.max(initial=0)),
    )
