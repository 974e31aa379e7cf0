"""Matrix products with weights that were prepared once. M rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tessera.ops.precision import wide

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

SWAPPED_UP_TO = 128  # rows; from about 200 on turning the result costs more than the weight's repacking
SWAPPED_FROM = 1 << 20  # bytes of a weight; repacking a smaller one costs less than turning the result
TURNED = 8192  # columns turned at a time: their cache lines stay until they are full
WIDENED = 1 << 19  # numbers of a weight that are widened at a time: 2 MB in fp32, which stay in cache


@dataclass(frozen=True, slots=True)
class AfterGate:
    """`product(y, unrounded)`: of silu(gate) * up with a weight, from y [T, gate | up] of more than `above` rows."""

    above: int
    product: Callable[[Tensor, bool], Tensor]


def widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] in fp32 or wider, by wide copies of x and, some rows at a time, of the weight, which
    lies as it was loaded: PyTorch has no product of narrow numbers on a CPU whose result stays wide. (Two products, of
    which the second one takes what the first was rounded to from its own sum, keep 16 bits: not enough, see
    `bench/results/rounding.md`.)"""
    rows = x.flatten(0, -2).to(wide(x.dtype))
    out, size = rows.new_empty(len(rows), len(weight)), max(WIDENED // weight.shape[1], 1)
    held = rows.new_empty(min(size, len(weight)), weight.shape[1])
    for part, y in zip(weight.split(size), out.split(size, 1), strict=True):
        torch.mm(rows, held[: len(part)].copy_(part).T, out=y)
    return (out if bias is None else out.add_(bias)).unflatten(0, x.shape[:-1])


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the form that `product(x, weight, bias)` wants. Holds the only copy.

    `gated`: silu(gate) * up of the product with a weight [gate | up, in], where that is an op of its own. `below`: the
    rows behind those of this weight, where they are kept in another form. `after_gate`: the product with what a gate
    gives, where that is one. `unrounded`: the product in fp32 or wider.
    """

    weight: Tensor
    bias: Tensor | None
    product: Product
    gated: Callable[[Tensor], Tensor] | None = None
    below: PackedLinear | None = None
    after_gate: AfterGate | None = None
    unrounded: Product = widened

    def tensors(self) -> list[Tensor]:
        """The weights of all rows."""
        return [self.weight, *(self.below.tensors() if self.below is not None else [])]


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """x [..., in] -> [..., out]: `x @ weight.T + bias`."""
    y = packed.product(x, packed.weight, packed.bias)
    return y if packed.below is None else torch.cat((y, linear(x, packed.below)), -1)


def unrounded(x: Tensor, packed: PackedLinear) -> Tensor:
    """`linear` in fp32 or wider: a part of a sum, which is rounded once, when all parts are there."""
    assert packed.below is None, "rows in several forms"
    return packed.unrounded(x, packed.weight, packed.bias)


def stacked(parts: Sequence[PackedLinear]) -> PackedLinear:
    """The rows of several weights, one below the other, as one."""
    first, *rest = parts
    return replace(first, below=stacked(rest)) if rest else first


def pack_reference(weight: Tensor, bias: Tensor | None = None, packs: bool = True) -> PackedLinear:
    """Prepares weight [out, in] for `linear`. The caller drops its own reference to `weight`.

    `packs` False: the weight stays as it is, for others who read it, or since its products are to be `unrounded`.
    """
    return PackedLinear(weight, bias, torch.nn.functional.linear)


def pack(weight: Tensor, bias: Tensor | None = None, packs: bool = True) -> PackedLinear:
    """See `pack_reference`. bfloat16 on a CPU gets the product that reads its weight once and at full speed."""
    if swaps_pay(weight):
        return PackedLinear(weight, bias, swapped)
    if packs and prepacks(weight):
        return PackedLinear(prepack(weight), bias, prepacked)
    return pack_reference(weight, bias)


def prepacks(weight: Tensor) -> bool:
    """Whether `prepacked` is the fastest product with this weight: bfloat16 on a CPU that multiplies it without AMX."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and has_bf16() and not has_amx()


def swaps_pay(weight: Tensor) -> bool:
    """Whether `swapped` is the faster product with this weight: it is large, and of bfloat16 on a CPU with AMX."""
    large = weight.nbytes >= SWAPPED_FROM
    return large and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and has_amx()


@lru_cache(1)
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX)."""
    return has_bf16() and bool(torch.cpu._is_amx_tile_supported())


@lru_cache(1)
def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX)."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def swapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(weight @ x.T).T` for up to `SWAPPED_UP_TO` rows: on AMX the left factor is read as it lies, where `F.linear`
    repacks the whole weight at every call. The bits of a row do not depend on the other rows.
    """
    if x.dim() != 2:
        return swapped(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    if not 0 < len(x) <= SWAPPED_UP_TO:
        return torch.nn.functional.linear(x, weight, bias)
    columns = as_columns(x)
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return turned(y[:, :1] if len(x) == 1 else y)


def as_columns(rows: Tensor) -> Tensor:
    """rows [M, in] -> [in, M]; a single one twice, for one column alone would get another, slower kernel."""
    return rows.expand(2, -1).T if len(rows) == 1 else rows.T


def turned(y: Tensor) -> Tensor:
    """y [out, M] -> its transpose [M, out], contiguous. By way of three dims, which torch copies with all threads."""
    if len(y) <= TURNED:
        return y[None].mT.contiguous()[0]
    out = y.new_empty(y.shape[1], y.shape[0])
    for source, target in zip(y.split(TURNED), out.split(TURNED, 1), strict=True):
        target[None].copy_(source.T[None])
    return out


def prepack(weight: Tensor) -> Tensor:
    """Weight [out, in] of bfloat16 in the blocked form of oneDNN (an opaque tensor), for products of few rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    return packed


def prepacked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] with a weight of `prepack`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
