"""Weights that are quantised while they are loaded (`--quantization fp8`): another source, seen in fp8 blocks.

Blocks are those of the whole tensor: of a box that cuts some, all of these are read, so that every cut of a tensor has
the same bytes as the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tessera.core.quantization import Quantization
from tessera.models.source import BLOCK_BYTES, Source, Span
from tessera.ops.fp8 import dequantize, quantize_weight


class Quantizing:
    """`source` with what `quantization` covers in fp8; the rest as it is."""

    def __init__(self, source: Source, quantization: Quantization) -> None:
        self.source, self.quantization = source, quantization
        self.waits = source.waits

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Source.shape`."""
        return self.source.shape(name)

    def where(self, name: str) -> str:
        """See `Source.where`."""
        return self.source.where(name)

    def leftovers(self, used: Iterable[str]) -> list[str]:
        """See `Source.leftovers`."""
        return self.source.leftovers(used)

    def copy(self, name: str, rows: Span, columns: Span, out: Tensor) -> None:
        """See `Source.copy`. What is covered is quantised and multiplied by its scales again."""
        if not self.quantization.covers(name):
            self.source.copy(name, rows, columns, out)
            return
        for part, (values, scales), (top, left) in self._slabs(name, rows, columns, out.device):
            plain = dequantize(values, scales, self.quantization.block)
            out[part].copy_(plain[top : top + part.stop - part.start, left : left + columns[1]])

    def fp8(self, name: str, rows: Span, columns: Span, out: Tensor) -> Tensor:
        """See `Source.fp8`."""
        assert self.quantization.covers(name), f"'{name}' is not quantised"
        found = []
        for part, (values, scales), (top, left) in self._slabs(name, rows, columns, out.device):
            out[part].copy_(values[top : top + part.stop - part.start, left : left + columns[1]])
            found.append(scales)
        return torch.cat(found)

    def _slabs(
        self, name: str, rows: Span, columns: Span, device: torch.device
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor], tuple[int, int]]]:
        """Some rows of a box at a time: which, the values and scales of all blocks that they touch, where they begin
        in these."""
        shape, (height, width) = self.source.shape(name), self.quantization.block
        assert shape is not None, name
        first, left = columns[0] - columns[0] % width, columns[0] % width
        length = min(-(-sum(columns) // width) * width, shape[1]) - first
        slab = max(BLOCK_BYTES // (4 * length * height), 1) * height
        begin, end = rows[0], sum(rows)
        for top in range(begin - begin % height, end, slab):
            bottom = min(top + slab, -(-end // height) * height, shape[0])
            wide = torch.empty(bottom - top, length, device=device)
            self.source.copy(name, (top, bottom - top), (first, length), wide)
            start, stop = max(top, begin), min(bottom, end)
            part = slice(start - begin, stop - begin)
            yield part, quantize_weight(wide, self.quantization.block), (start - top, left)
