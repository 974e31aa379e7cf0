"""What every `Comm` must do, as a program that all ranks run: random collectives, checked against plain sums and cats.

Each rank knows what all the others bring, since that follows from a seed, so each checks its own results.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.comm.base import Comm, Handle
from tessera.core.mesh import Mesh, instance_mesh

MESHES = {
    "tp 4": instance_mesh(4),
    "tp 4, dp 2": instance_mesh(4, dp=2),
    "tp 4, dp 2, ep 2": instance_mesh(4, dp=2, ep=2, dense_tp=1),
    "tp 4, dp 4, ep 4": instance_mesh(4, dp=4, ep=4, dense_tp=2),
    "tp 3": instance_mesh(3, ep=3),
    "tp 2": instance_mesh(2, dp=2),
}
KINDS = ("sum", "gather", "scatter_sum", "exchange")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
# How far a sum in another order may be off, relative to its largest term.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Case:
    """One collective of all groups of an axis. `lengths` along `dim` by coordinate."""

    kind: str
    axis: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    lengths: tuple[int, ...]
    parts: int
    tell: bool  # whether the ranks say the lengths of a gather
    result: torch.dtype | None  # of a sum, where it is not that of its parts
    seed: int

    def brought(self, rank: int, coordinate: int) -> list[Tensor]:
        """What a rank brings: of mixed size, so that the order of a sum shows, and sometimes not in one piece."""
        make = torch.Generator().manual_seed(self.seed * 64 + rank)
        shape = list(self.shape)
        if self.kind == "gather":
            shape[self.dim] = self.lengths[coordinate]
        if self.kind == "exchange":
            shape[0] = sum(self.sent(coordinate))
        parts = [torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(self.parts)]
        parts = [(part * 10.0 ** torch.randint(-3, 3, shape, generator=make)).to(self.dtype) for part in parts]
        return [part.mT.contiguous().mT for part in parts] if self.seed % 3 == 0 else parts

    def sent(self, coordinate: int) -> list[int]:
        """Rows that a coordinate sends to each, in an exchange."""
        chance = random.Random(f"{self.seed} {coordinate}")
        return [chance.choice([0, 0, 1, 3, 8]) for _ in self.lengths]

    def start(self, comm: Comm, device: torch.device) -> Handle:
        """Calls the collective."""
        parts = [part.to(device) for part in self.brought(comm.rank, comm.mesh.coordinate(comm.rank, self.axis))]
        if self.kind == "sum":
            return comm.sum(parts, self.axis, self.result)
        if self.kind == "scatter_sum":
            return comm.scatter_sum(parts, self.axis, self.dim, self.lengths, self.result)
        if self.kind == "exchange":
            at = comm.mesh.coordinate(comm.rank, self.axis)
            received = [self.sent(c)[at] for c in range(len(self.lengths))]
            sent = self.sent(at)
            return comm.exchange(parts[0], self.axis, sent, *([received] if self.tell else []))
        return comm.gather(parts[0], self.axis, self.dim, *([self.lengths] if self.tell else []))

    def expected(self, mesh: Mesh, rank: int) -> Tensor:
        """The plain result."""
        group = mesh.group(rank, self.axis)
        parts = [part for i, r in enumerate(group) for part in self.brought(r, i)]
        if self.kind == "gather":
            return torch.cat(parts, self.dim)
        if self.kind == "exchange":
            at = mesh.coordinate(rank, self.axis)
            return torch.cat([part.split(self.sent(c))[at] for c, part in enumerate(parts)])
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part.to(wide)
        total = total.to(self.result or self.dtype)
        if self.kind == "sum":
            return total
        at = mesh.coordinate(rank, self.axis)
        first = sum(self.lengths[:at])
        return total.narrow(self.dim, first, self.lengths[at])

    def check(self, got: Tensor, mesh: Mesh, rank: int, exact: bool) -> None:
        """Compares to the bit; a `sum` of a `Comm` that is not `exact`, up to rounding."""
        want = self.expected(mesh, rank)
        where = f"rank {rank}, {self}"
        assert got.shape == want.shape, f"{where}: {tuple(got.shape)} instead of {tuple(want.shape)}"
        assert got.dtype == want.dtype, f"{where}: {got.dtype}"
        if exact or self.kind != "sum":
            assert torch.equal(got, want), f"{where}: off by {(got - want).abs().max()}"
        elif want.numel():
            brought = [p for i, r in enumerate(mesh.group(rank, self.axis)) for p in self.brought(r, i)]
            scale = torch.stack(brought).double().abs().sum(0)
            off = ((got.double() - want.double()).abs() / scale.clamp_min(1e-30)).max()
            assert off <= ROUNDING[got.dtype], f"{where}: off by {off} of the terms"


def cases(mesh: Mesh, seed: int, count: int) -> list[Case]:
    """Random collectives; every axis and kind comes up early."""
    chance, found = random.Random(seed), []
    axes = [axis.name for axis in mesh.axes]
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        axis = axes[i // len(KINDS) % len(axes)]
        shape = chance.choice([(0, 8), (1, 8), (5, 33), (7, 3, 4), (64, 48)])
        dim = chance.choice([0, 0, -1, 1])
        lengths = [chance.choice([0, 1, 3, 8, 17]) for _ in range(mesh.size_of(axis))]
        if chance.random() < 0.3:
            lengths = [lengths[0]] * len(lengths)
        if kind == "scatter_sum":
            sizes = list(shape)
            sizes[dim] = sum(lengths)
            shape = tuple(sizes)
        parts = 1 if kind in ("gather", "exchange") else chance.choice([1, 1, 2, 3])
        made = (kind, axis, chance.choice(DTYPES), shape, dim, tuple(lengths), parts, chance.random() < 0.5)
        narrow = made[2] == torch.float32 and kind in ("sum", "scatter_sum") and i % 3 > 0
        found.append(Case(*made, torch.bfloat16 if narrow else None, seed=seed * count + i))
    return found


def run(comm: Comm, seed: int = 0, count: int = 80, exact: bool = True, device: torch.device = CPU) -> None:
    """Runs the cases in windows: several are begun, then waited for in the order of their beginning."""
    chance = random.Random(seed)
    waiting: list[tuple[Case, Handle]] = []
    for case in cases(comm.mesh, seed, count):
        waiting.append((case, case.start(comm, device)))
        if chance.random() < 0.3:
            _finish(comm, waiting, chance.randrange(len(waiting) + 1), exact)
    _finish(comm, waiting, len(waiting), exact)


def _finish(comm: Comm, waiting: list[tuple[Case, Handle]], number: int, exact: bool) -> None:
    for case, handle in waiting[:number]:
        case.check(handle.wait().cpu(), comm.mesh, comm.rank, exact)
    del waiting[:number]
