"""Matrix products with weights that were prepared once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the form that `product(x, weight, bias)` wants. Holds the only copy."""

    weight: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    product: Product


def pack_reference(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Prepares weight [out, in] for `linear`. The caller drops its own reference to `weight`."""
    return PackedLinear(weight, bias, *weight.shape, torch.nn.functional.linear)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """x [..., in] -> [..., out]: `x @ weight.T + bias`."""
    return packed.product(x, packed.weight, packed.bias)


pack = pack_reference
