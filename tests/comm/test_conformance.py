"""Every kind of collectives gives what the plain sums and cats give, and the suite that says so sees faults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from comm import conformance
from comm.ranks import as_processes, as_threads, raise_first, run_program
from ports import free_port
from tessera.comm import base, brought
from tessera.comm.base import Handle, Ready
from tessera.comm.local import LocalComm
from tessera.core.errors import TesseraError
from tessera.core.mesh import Mesh, instance_mesh


@pytest.mark.parametrize("name", conformance.MESHES)
def test_threads(name: str) -> None:
    raise_first(as_threads(conformance.MESHES[name], conformance.run))


def every_mesh(rank: int, kind: str, ports: list[int], options: dict[str, Any], exact: bool) -> None:
    """A rank's part in all meshes, one after the other, in one process."""
    for seed, (mesh, port) in enumerate(zip(conformance.MESHES.values(), ports, strict=True)):
        run_program(rank, mesh, kind, port, partial(conformance.run, seed=seed, exact=exact), options)


@pytest.mark.parametrize(
    ("kind", "options", "exact"),
    [("shared", {}, True), ("gloo", {}, False), ("gloo", {"ordered": True}, True)],
    ids=["shared", "gloo", "gloo in order"],
)
def test_processes(kind: str, options: dict[str, Any], exact: bool) -> None:
    before = set(os.listdir("/dev/shm"))
    raise_first(as_processes(4, every_mesh, kind, [free_port() for _ in conformance.MESHES], options, exact))
    assert set(os.listdir("/dev/shm")) <= before, "a segment was left behind"


class GathersBackwards(LocalComm):
    """Takes the parts in the wrong order."""

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        parts = [p for (p,) in self.group.take(self._bring(axis, "gather", (part,)), self.rank)]
        return Ready(torch.cat(parts[::-1], dim))


class SwapsLengths(LocalComm):
    """Keeps the length of another coordinate."""

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: torch.dtype | None = None
    ) -> Handle:
        return super().scatter_sum(parts, axis, dim, lengths[::-1], dtype)


class KeepsOthers(LocalComm):
    """Keeps the elements of another coordinate where the lengths are equal."""

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: torch.dtype | None = None
    ) -> Handle:
        moved = [p.roll(lengths[-1], dim) for p in parts]
        return super().scatter_sum(moved if len(set(lengths)) == 1 else parts, axis, dim, lengths, dtype)


class SendsBackwards(LocalComm):
    """Cuts an exchange by the lengths of the others."""

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        return super().exchange(part, axis, sent[::-1], None)


class MixesAxes(LocalComm):
    """Takes one axis for another where both are of one size."""

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: torch.dtype | None = None) -> Handle:
        other = "dp" if axis == "attn" and self.mesh.size_of("dp") == self.mesh.size_of("attn") else axis
        return super().sum(parts, other, dtype)


class MixesHandles(LocalComm):
    """Gives the tensor of the collective before."""

    last: Handle | None = None

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: torch.dtype | None = None) -> Handle:
        mine = super().sum(parts, axis, dtype).wait()
        given, self.last = self.last or Ready(mine), Ready(mine)
        return given


def backwards(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Adds from last to first."""
    return base.ordered_sum(parts[::-1], dtype)


def narrow(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Rounds after each addition."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(dtype or total.dtype)


MUTANTS = [GathersBackwards, SwapsLengths, KeepsOthers, SendsBackwards, MixesAxes, MixesHandles]
MESH = conformance.MESHES["tp 4, dp 2"]


def found(results: list[Any]) -> bool:
    """Whether some rank saw a fault."""
    return any(isinstance(result, (AssertionError, RuntimeError, TesseraError)) for result in results)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_fault_is_seen(mutant: type[LocalComm], exact: bool) -> None:
    assert found(as_threads(MESH, partial(conformance.run, exact=exact), mutant, deadline_s=5))


@pytest.mark.parametrize("wrong", [backwards, narrow])
def test_a_sum_in_another_order_is_seen(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brought, "ordered_sum", wrong)
    assert found(as_threads(MESH, conformance.run))


def test_what_was_given_away_is_spoilt() -> None:
    """A layer that goes on using a part it gave to `sum` is wrong on GPUs; with threads it is wrong at once."""

    def layer(comm: LocalComm) -> Tensor:
        x = torch.ones(2, 3)
        handle = comm.sum([x], "tp")
        return x + handle.wait()

    results = as_threads(Mesh(2, instance_mesh(2).axes), layer)
    raise_first(results)
    assert all(result.isnan().all() for result in results)


def test_nothing_of_the_suite_is_idle() -> None:
    """The cases hold every kind on every axis, with zero rows, unequal lengths and several parts."""
    for name, mesh in conformance.MESHES.items():
        made = conformance.cases(mesh, 0, 80)
        assert {(c.kind, c.axis) for c in made} == {
            (kind, axis.name) for kind in conformance.KINDS for axis in mesh.axes
        }, name
        assert {c.dtype for c in made} == set(conformance.DTYPES)
        assert any(0 in c.shape for c in made)
        assert any(len(set(c.lengths)) > 1 for c in made)
        assert any(c.parts > 1 for c in made)
