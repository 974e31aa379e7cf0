"""What `kernels.py` times: one call of a kernel at one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COLD = 256 << 20  # bytes of inputs that no cache holds
MOST_SETS = 48


@dataclass
class Case:
    """`make()` makes a set of inputs of `set_bytes`, `run(inputs, **options)` computes on it.

    `num_bytes` must move and `operations` must be done. `check(inputs, result)`: the distance of a result from the
    plain twin's, relative to the largest magnitude. `variants`: options that a sweep tries beside {}.
    """

    name: str
    num_bytes: float
    operations: float
    set_bytes: int
    make: Callable[[], Any]
    run: Callable[..., Tensor]
    check: Callable[[Any, Tensor], float]
    variants: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_sets(self) -> int:
        """Sets that together are larger than the cache, as the layers of a model are."""
        return max(2, min(MOST_SETS, round(COLD / self.set_bytes)))


def random(*shape: int) -> Tensor:
    """bf16 numbers on the device."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest magnitude; infinite where something is not a number."""
    value = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    return value if value == value else float("inf")
