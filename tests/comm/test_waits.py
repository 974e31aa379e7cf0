"""Generators side by side: turns in order, one ahead of the other at every stage."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tessera.comm.waits import Waits, drain, interleave


@dataclass
class Wire:
    """A handle that tells when it is waited for."""

    name: str
    log: list[str]

    def wait(self) -> torch.Tensor:
        self.log.append(f"wait {self.name}")
        return torch.tensor(len(self.log))


def work(name: str, stages: int, log: list[str]) -> Waits[str]:
    for stage in range(stages):
        log.append(f"compute {name}{stage}")
        got = yield Wire(f"{name}{stage}", log)
        assert got == len(log), "each gets what it waited for"
    log.append(f"end {name}")
    return name


def test_one_computes_while_the_other_is_on_the_wire() -> None:
    log: list[str] = []
    assert interleave([work("a", 2, log), work("b", 2, log)]) == ["a", "b"]
    assert log == [
        *("compute a0", "compute b0", "wait a0", "compute a1", "wait b0", "compute b1"),
        *("wait a1", "end a", "wait b1", "end b"),
    ]


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_alone(stages: int) -> None:
    log: list[str] = []
    assert drain(work("a", stages, log)) == "a"
    assert log.count("end a") == 1
    assert len(log) == 2 * stages + 1


@pytest.mark.parametrize("stages", [(3, 2), (2, 3), (0, 1)])
def test_one_that_ends_before_the_other_is_refused(stages: tuple[int, int]) -> None:
    """Known fault: the later half got ahead of the one whose keys it reads, and results came in the order of ends."""
    log: list[str] = []
    with pytest.raises(RuntimeError, match="1 of 2 batches side by side ended"):
        interleave([work(name, n, log) for name, n in zip("ab", stages, strict=True)])


def test_nothing_is_run_of_nothing() -> None:
    assert interleave([]) == []
