"""Counts the bytes of tensors that are alive, as an allocator of a device would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """While it is open: `peak`, the most bytes held at once by tensors that were made meanwhile. What an operation of
    torch needs inside is not seen. `paused`: nothing is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.paused = 0, False
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and _key(made) not in given and _key(made) not in self._alive:
                storage = made.untyped_storage()
                self._alive[_key(made)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
