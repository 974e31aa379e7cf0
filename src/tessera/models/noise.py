"""Random weights (`--load-format dummy`): no checkpoint is needed, and every layout sees the same whole model.

An element is a pure function of (seed, tensor name, index), so ranks draw parts of the same tensors. A buffer of normal
noise of prime length is read round and round from a start that depends on the name: as fast as memory copies.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from tessera.models.source import Span, blocks

LENGTH = 1_048_573  # a prime: rows of no length repeat within a tensor of a million rows


class Noise:
    """A source of the tensors of `shapes`. `zero_centred`: norms scale by 1 + w. The same noise on every device."""

    waits = False

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], zero_centred: bool, seed: int = 0) -> None:
        self.shapes, self.zero_centred, self.seed = shapes, zero_centred, seed
        self._noise = torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed))
        self._cast: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Source.shape`."""
        return self.shapes.get(name)

    def where(self, name: str) -> str:
        """See `Source.where`."""
        return f"dummy weights of seed {self.seed}"

    def copy(self, name: str, rows: Span, columns: Span, out: Tensor) -> None:
        """See `Source.copy`."""
        shape = self.shapes[name]
        width = max(1, prod(shape[1:]))
        kind = (out.dtype, out.device)
        if kind not in self._cast:
            self._cast[kind] = self._noise.to(out.device, out.dtype)
        noise = self._cast[kind]
        first, done = zlib.crc32(f"{self.seed}:{name}".encode()), 0
        for start, length in blocks(rows, width * out.dtype.itemsize):
            box = _round(noise, first + start * width, length * width).view(length, width)
            out[done : done + length].copy_(box.narrow(1, *columns))
            done += length
        scale, mean = self._moments(name, shape)
        out.mul_(scale)
        if mean:
            out.add_(mean)

    def fp8(self, name: str, rows: Span, columns: Span, out: Tensor) -> Tensor:
        """Noise is not quantised: see `quantizing.py`."""
        raise AssertionError(f"noise '{name}' as fp8")

    def leftovers(self, used: Iterable[str]) -> list[str]:
        """Nothing: there is no more than what is asked for."""
        return []

    def _moments(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Spread and mean that keep activations near one."""
        if name.endswith(("A_log", "dt_bias")):
            return 0.5, 0.0
        if name.endswith("e_score_correction_bias"):
            return 0.1, 0.0
        if len(shape) == 1:  # a norm; the one inside a delta net scales by w in every family
            return 0.1, 0.0 if self.zero_centred and not name.endswith("linear_attn.norm.weight") else 1.0
        return float(shape[-1] ** -0.5), 0.0


def _round(noise: Tensor, first: int, count: int) -> Tensor:
    """`count` elements of the noise from `first` on, round and round."""
    at = first % len(noise)
    pieces = [noise[at : at + count]]
    left = count - len(pieces[0])
    pieces += [noise] * (left // len(noise))
    pieces.append(noise[: left % len(noise)])
    return torch.cat(pieces)
