"""The two ends of a model: rows by id (embedding) and products (head), of one matrix held once where they are tied.

V rows of the vocabulary, H hidden, T tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from tessera.ops.linear import PackedLinear, pack, pack_reference, prepack, prepacked, prepacks

WIDTHS = (64, 48, 32, 16)  # rows of a block in oneDNN's forms
CHECKED = 256  # rows that are compared


@dataclass(frozen=True, slots=True)
class Ends:
    """`rows(ids [T]) -> [T, H]`; `head` for `linear`."""

    rows: Callable[[Tensor], Tensor]
    head: PackedLinear


def plain_rows(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows of a matrix that lies as it is."""
    return partial(embedding, weight=weight)


def tie_reference(weight: Tensor) -> Ends:
    """Both uses of weight [V, H]. The caller drops its own reference to it: it may be kept in another form."""
    return Ends(plain_rows(weight), pack_reference(weight))


def tie(weight: Tensor) -> Ends:
    """See `tie_reference`. Where products want the weight packed, rows are read out of the packed form.

    That form is oneDNN's own affair: it is only trusted where rows read from it are those of the weight.
    """
    if prepacks(weight):
        packed = prepack(weight)
        ids = torch.linspace(0, len(weight) - 1, CHECKED).long()
        for width in WIDTHS:
            blocks = Blocks.of(packed, weight.shape, width)
            if blocks is not None and torch.equal(blocks(ids), weight[ids]):
                return Ends(blocks, PackedLinear(packed, None, prepacked))
    return Ends(plain_rows(weight), pack(weight, packs=False))


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a packed bfloat16 matrix whose memory is [blocks, H / 2, rows of a block, 2]."""

    packed: Tensor  # owns the memory
    pairs: Tensor  # a view of it: int32 [blocks, H / 2, rows of a block]

    @classmethod
    def of(cls, packed: Tensor, shape: tuple[int, ...], width: int) -> Blocks | None:
        """With blocks of `width` rows; None where the size says that there are none."""
        rows, columns = shape
        size = torch.ops.mkldnn._nbytes(packed)
        if columns % 2 or size != -(-rows // width) * width * columns * packed.element_size():
            return None
        memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
        return cls(packed, torch.frombuffer(memory, dtype=torch.int32).view(-1, columns // 2, width))

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H]."""
        width = self.pairs.shape[2]
        return self.pairs[ids // width, :, ids % width].view(self.packed.dtype)
