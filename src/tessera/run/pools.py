"""Cache pools of a rank: per cache spec one tensor with a row per page, or per slot. Page 0 and slot 0 are scratch:
padding may write them, nobody reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tessera.core.mesh import SINGLE, Mesh
from tessera.core.tensors import CacheSpec
from tessera.ops.narrow import movable
from tessera.ops.upload import upload_columns
from tessera.plan.step import Change, Ints, Part


class Pools:
    """`tensors` by cache name: `[num_pages or num_slots, *local shape]`, zeroed."""

    def __init__(
        self,
        table: Sequence[CacheSpec],
        num_pages: int,
        num_slots: int,
        device: torch.device | str = "cpu",
        mesh: Mesh = SINGLE,
        rank: int = 0,
    ) -> None:
        self.num_pages, self.num_slots = num_pages, num_slots
        self.device = torch.device(device)
        self.tensors: dict[str, Tensor] = {}
        for spec in table:
            units = num_pages if spec.kind == "page" else num_slots
            shape = (units, *spec.layout.local_shape(mesh, rank))
            self.tensors[spec.name] = torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=self.device)
        flat = {spec.name: movable(self.tensors[spec.name]) for spec in table}
        self._paged = [flat[spec.name] for spec in table if spec.kind == "page"]
        self._slotted = [flat[spec.name] for spec in table if spec.kind == "slot"]

    def apply(self, change: Change) -> None:
        """Copies and zeroing of a change. All sources are read before anything is written; zeroed slots come last."""
        if not (len(change.page_copies) or len(change.slot_copies) or len(change.zero_slots)):
            return
        columns = (*change.page_copies.T, *change.slot_copies.T, change.zero_slots)
        page_src, page_dst, slot_src, slot_dst, zeros = upload_columns(columns, self.device)
        zeros = zeros.long()
        if len(page_src):
            for pool in self._paged:
                pool[page_dst] = pool[page_src]
        for pool in self._slotted:
            held = pool[slot_src] if len(slot_src) else None
            if len(zeros):
                pool.index_fill_(0, zeros, 0)  # `pool[zeros] = 0` brings the number from the host, and waits for that
            if held is not None:
                pool[slot_dst] = held

    def wipe_scratch(self) -> None:
        """Page 0 and slot 0 are zero again."""
        for pool in self.tensors.values():
            pool[:1].zero_()


class SlotWatch:
    """Debug mode: which position the state in each slot stands at. Every range must continue where its slot stands."""

    def __init__(self, num_slots: int) -> None:
        self.positions = np.full(num_slots, -1, np.int64)

    def apply(self, change: Change) -> None:
        """Copies carry the position along; a zeroed slot stands at 0, one that came from elsewhere where it ended."""
        for enter in change.enter:
            if enter.arrived and enter.slot >= 0:
                self.positions[enter.slot] = enter.start
        held = self.positions[change.slot_copies[:, 0]]
        self.positions[change.zero_slots] = 0
        self.positions[change.slot_copies[:, 1]] = held

    def advance(self, part: Part, slots: Ints) -> None:
        """Moves the slots of a part's ranges on. AssertionError when one is read at another position, or twice."""
        used = slots[part.rows]
        assert len(np.unique(used)) == len(used), f"a slot is used by two ranges of a step: {used.tolist()}"
        found = self.positions[used]
        wrong = np.flatnonzero(found != part.starts)
        assert not len(wrong), (
            f"rows {part.rows[wrong].tolist()} read slots {used[wrong].tolist()} at positions {found[wrong].tolist()}, "
            f"but their ranges start at {part.starts[wrong].tolist()}"
        )
        self.positions[used] = part.starts + part.lengths
