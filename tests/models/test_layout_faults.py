"""The known faults of layouts, put in one by one: the comparison with one rank must see each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.test_layouts import Layout, check
from tessera.comm.together import Across, Within
from tessera.comm.waits import Waits
from tessera.core.layout import Dim, Section
from tessera.models.experts import MoE
from tessera.ops import travel
from tessera.ops.travel import Places

Good = Callable[..., Any]
SEED = 4  # models with two KV heads, two key heads and a vocabulary that is padded
TWO: Layout = (2, 1, 1, 2, False, False)


def modulo(good: Good, section: Section, size: int, rank: int) -> Sequence[int]:
    """Replicas of KV heads dealt out in turn, not side by side."""
    held: Sequence[int] = good(section, size, rank)
    return [rank % section.units] if section.leaders and size > section.units else held


def one_block(good: Good, dim: Dim, size: int, rank: int) -> Iterator[Any]:
    """q | k | v cut as one contiguous block."""
    if dim.name == "channels" and size > 1:
        last = replace(dim.sections[-1], units=dim.length, width=1)
        dim = replace(dim, sections=(last,))
    found: Iterator[Any] = good(dim, size, rank)
    return found


def other_order(good: Good, self: Across, counts: Sequence[int]) -> list[int]:
    """The tokens of the last DP rank taken for those of the first."""
    return list(good(self, counts))[::-1]


def own_rows(good: Good, self: Across, parts: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
    """Every rank keeps what it has, as if all had the same part of the vocabulary."""
    rows = parts.split([counts[dp] for dp in self.members])[self.at]
    yield from ()
    return torch.stack([rows] * len(self.members))


def turned_round(good: Good, self: Across, parts: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
    """The parts of the vocabulary in another order."""
    rows = yield from good(self, parts, counts)
    return rows.flip(0)


def no_sum(good: Good, self: Within, parts: Tensor, counts: Sequence[int], dtype: object) -> Waits[Tensor]:
    """A rank's part taken for the sum."""
    yield from ()
    return parts


def half_sum(good: Good, self: Across, parts: Tensor, counts: Sequence[int], dtype: object) -> Waits[Tensor]:
    """Summed in the attention group alone."""
    own = parts.split([counts[dp] for dp in self.members])[self.at]
    return (yield self.comm.sum([own.clone()], self.within))


def as_held(good: Good, self: MoE, held: list[int]) -> Tensor:
    """Experts numbered from 0 on every rank."""
    ids: Tensor = good(self, list(range(len(held))))
    return ids


def other_rows(good: Good, places: Places) -> Tensor:
    """What comes back is added to the tokens as they stand, not to those it was sent for."""
    rows: Tensor = good(places)
    return rows.flip(0)


def shared_everywhere(good: Good, self: MoE, x: Tensor) -> Tensor:
    """Shared experts that are whole on every rank, added to every part of a sum."""
    return self.joined(good(self, x), self.shared(x), x)


FAULTS: list[tuple[Any, str, Good, str, Layout]] = [
    (Section, "held", modulo, "qwen3", (4, 1, 1, 4, False, False)),
    (Dim, "_blocks", one_block, "qwen3_next", TWO),
    (Across, "_lengths", other_order, "qwen3_moe", (2, 2, 1, 2, True, False)),
    (Across, "own", turned_round, "llama", (4, 2, 1, 1, False, False)),
    (Across, "own", own_rows, "llama", (2, 2, 1, 1, False, False)),
    (Within, "home", no_sum, "llama", TWO),
    (Across, "home", half_sum, "qwen3", (4, 2, 1, 4, True, False)),
    (travel, "_rows", other_rows, "qwen3_moe", (2, 2, 2, 2, False, True)),
    (MoE, "whole", shared_everywhere, "qwen3_5_moe_text", TWO),
    (MoE, "_local_ids", as_held, "qwen3_moe", (2, 1, 2, 2, False, False)),
]


@pytest.mark.parametrize(("where", "name", "fault", "family", "layout"), FAULTS, ids=[f[2].__name__ for f in FAULTS])
def test_a_known_fault_is_seen(
    where: Any, name: str, fault: Good, family: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(family, SEED, layout)
    good = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: fault(good, *args))
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check(family, SEED, layout)
