"""Where weights come from: a checkpoint in safetensors, or noise. A source copies boxes of tensors and keeps none.

Tensors are seen as matrices [rows, columns] (further dims flattened into columns, a vector as one column).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

Span = tuple[int, int]  # start, length

BLOCK_BYTES = 1 << 23  # what is read at a time: small beside any model, large beside the cost of a read


class Source(Protocol):
    """Named tensors that can be copied in boxes. Names are the canonical ones of `core/weights.py`.

    It writes into memory of any device, from any thread. `waits`: its copies wait for storage, so that several threads
    read more.
    """

    waits: bool

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when there is none of that name."""
        ...

    def where(self, name: str) -> str:
        """Where the tensor is, or should be: for errors."""
        ...

    def copy(self, name: str, rows: Span, columns: Span, out: Tensor) -> None:
        """Writes the box of tensor `name` into `out` [rows, columns], converting to its dtype."""
        ...

    def fp8(self, name: str, rows: Span, columns: Span, out: Tensor) -> Tensor:
        """Writes the box of a tensor in fp8 blocks into `out` [rows, columns] of float8_e4m3fn, on any device.

        Gives the scales of the blocks that the box touches [row blocks, column blocks], fp32, on any device.
        """
        ...

    def leftovers(self, used: Iterable[str]) -> list[str]:
        """Names that none of the tensors `used` accounts for."""
        ...


def blocks(rows: Span, row_bytes: int) -> Iterator[Span]:
    """The rows in blocks of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // row_bytes)
    start, length = rows
    for at in range(start, start + length, step):
        yield at, min(step, start + length - at)
