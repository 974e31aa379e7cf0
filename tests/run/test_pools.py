"""What a change does to the pools, and that no number for it comes from the host, which a device would wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.core.tensors import cache_dtypes, cache_table
from tessera.plan.step import Change
from tessera.run.pools import Pools
from test_invariance import model


class Scalars(TorchDispatchMode):
    """Operators that were given a tensor of one number without dimensions: made on the host, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(arg, torch.Tensor) and arg.ndim == 0 for arg in args):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def changed() -> tuple[Pools, list[str], Scalars]:
    """Pools of ones after copies from 1 to 2 and 4 to 5, and zeroed slots; the names of those by slot."""
    spec = model("hybrid").spec
    specs = cache_table(spec, 4, cache_dtypes(spec, "float32"))
    pools, pairs = Pools(specs, 8, 8), np.array([[1, 2]], np.int32)
    for tensor in pools.tensors.values():
        tensor.view(torch.uint8).fill_(1)
    with Scalars() as scalars:
        pools.apply(Change(page_copies=pairs, slot_copies=pairs + 3, zero_slots=np.array([1, 4, 7], np.int32)))
    return pools, [s.name for s in specs if s.kind == "slot"], scalars


def test_slots_are_copied_as_they_were_and_zeroed() -> None:
    pools, slotted, _ = changed()
    assert slotted
    for name in slotted:
        rows = [bool(row.any()) for row in pools.tensors[name]]
        assert rows == [True, False, True, True, False, True, True, False], "slot 5 has what 4 held before"


def test_no_number_comes_from_the_host() -> None:
    """Known fault: `pool[slots] = 0`, a wait for the device in each pool whenever a sequence enters."""
    assert changed()[2].found == []
