"""Promise: collectives through the memory of peers give what the plain ones give, whoever is ahead.

The kernels run in Triton's interpreter, all ranks in one thread: in any order of their begins and waits that the GPUs
could run them in. `test_nccl.py` runs them between GPUs.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tessera.comm import peers
from tessera.comm.base import ordered_sum
from tessera.comm.dist import told_late
from tessera.comm.peers import Memory, PeerCollectives, UnderWay, sizes
from tessera.core.mesh import instance_mesh

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter works on the host's memory")
DTYPES = (torch.bfloat16, torch.float32, torch.int32, torch.uint8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels of few bytes, so that every collective of the tests comes round to every slot."""
    monkeypatch.setattr(peers, "CHANNELS", 2)
    monkeypatch.setattr(peers, "REGION", 256)
    monkeypatch.setattr(peers, "LARGEST", 512)
    monkeypatch.setattr(peers, "BLOCK", 64)


def group(world: int) -> list[PeerCollectives]:
    """Ranks whose memory is that of this process, poisoned; their counts are about to wrap."""
    slots, flags = ([torch.full((size,), 255, dtype=torch.uint8) for _ in range(world)] for size in sizes(world))
    for own in flags:
        own.view(torch.int32).fill_(2**31 - 3)
    addresses = torch.tensor([[t.data_ptr() for t in slots], [t.data_ptr() for t in flags]])
    counters = [torch.full((peers.CHANNELS,), 2**31 - 3, dtype=torch.int32) for _ in range(world)]
    late = torch.zeros(world, dtype=torch.int32)
    return [
        PeerCollectives(Memory(addresses, counters[at], late.clone(), (slots, flags)), at, world, 1.0)
        for at in range(world)
    ]


def parts_of(number: int, kind: str, world: int) -> list[Tensor]:
    """What the ranks bring to a collective; not always in one piece, nor where 16 bytes can be loaded."""
    make = torch.Generator().manual_seed(number)
    chance = random.Random(number)
    rows, dtype = chance.choice([1, 3, 8]), chance.choice(DTYPES[: 2 if kind != "gather" else 4])
    shape = (rows * (world if kind == "scatter" else 1), chance.choice([1, 5, 8]))
    found = [torch.randn(*shape, generator=make) * 10.0 ** chance.randint(-2, 3) for _ in range(world)]
    found = [part.to(dtype) for part in found]
    return [torch.cat([part[:1], part])[1:] if number % 2 else part.T.contiguous().T for part in found]


def expected(kind: str, parts: list[Tensor], at: int, dtype: torch.dtype | None = None) -> Tensor:
    if kind == "gather":
        return torch.stack(parts)
    total = ordered_sum(parts, dtype)
    return total.chunk(len(parts))[at].flatten() if kind == "scatter" else total


def result(number: int, part: Tensor) -> torch.dtype | None:
    """What a sum is rounded to: parts in fp32 sometimes give bfloat16."""
    return torch.bfloat16 if number % 3 and part.dtype == torch.float32 else None


def begin(rank: PeerCollectives, kind: str, part: Tensor, dtype: torch.dtype | None = None) -> UnderWay:
    if kind == "gather":
        return rank.gather(part)
    return rank.sum(part.flatten(), rank.world, dtype) if kind == "scatter" else rank.sum(part, 1, dtype)


def program(seed: int, count: int) -> list[tuple[str, int]]:
    """Begins (by kind) and waits (by number of a begin), the same for all ranks, at most WINDOW under way."""
    chance, actions, waiting = random.Random(seed), [], []
    for number in range(count):
        while waiting and (
            len(waiting) == peers.WINDOW or number - waiting[0] >= peers.WINDOW or chance.random() < 0.4
        ):
            first = waiting[0] if number - waiting[0] >= peers.WINDOW else chance.choice(waiting)
            waiting.remove(first)
            actions.append(("wait", first))
        actions.append((chance.choice(["gather", "scatter", "sum"]), number))
        waiting.append(number)
    return actions + [("wait", number) for number in waiting]


def play(world: int, seed: int) -> None:
    """Ranks step through a program in a random order in which no rank waits for what a peer has not begun."""
    ranks, chance, actions = group(world), random.Random(seed), program(seed, 14)
    at, handles = [0] * world, [dict[int, UnderWay]() for _ in range(world)]
    kinds = {number: kind for kind, number in actions if kind != "wait"}
    brought = {number: parts_of(number + 100 * seed, kind, world) for number, kind in kinds.items()}
    ahead = chance.randrange(world)

    def can(rank: int) -> bool:
        if at[rank] == len(actions):
            return False
        kind, number = actions[at[rank]]
        return kind != "wait" or all(number in other for other in handles)

    while any(at[rank] < len(actions) for rank in range(world)):
        able = [rank for rank in range(world) if can(rank)]
        rank = ahead if ahead in able and chance.random() < 0.9 else chance.choice(able)
        kind, number = actions[at[rank]]
        if kind != "wait":
            assert ranks[rank].takes(1)
            part = brought[number][rank]
            handles[rank][number] = begin(ranks[rank], kind, part, result(number, part))
        else:
            found, kind = handles[rank][number].wait(), kinds[number]
            want = expected(kind, brought[number], rank, result(number, brought[number][rank]))
            assert (found.dtype, found.shape) == (want.dtype, want.shape)
            cut = (
                2.0**-7 if want.dtype == torch.bfloat16 and kind in ("sum", "scatter") else 0.0
            )  # the interpreter cuts off
            assert torch.allclose(found, want, rtol=cut, atol=0), f"rank {rank}, {kind} {number}"
            assert not ranks[rank].late, "everybody had begun"
        at[rank] += 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("world", [2, 3])
def test_results_are_plain_whoever_is_ahead(world: int, seed: int) -> None:
    play(world, seed)


def test_mutant_as_few_slots_as_collectives_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is behind is overtaken, and reads what belongs to a later collective."""
    monkeypatch.setattr(peers, "SLOTS", peers.WINDOW)
    caught = 0
    for seed in range(6):
        try:
            play(2, seed)
        except AssertionError:
            caught += 1
    assert caught


def test_what_goes_another_way_is_told_by_bytes_and_by_what_is_under_way() -> None:
    first, second = group(2)
    assert not first.takes(0)
    assert not first.takes(peers.LARGEST + 1)
    parts = parts_of(1, "sum", 2)
    handles = []
    for _ in range(peers.WINDOW):
        assert first.takes(peers.LARGEST)
        handles.append(first.sum(parts[0], 1))
        second.sum(parts[1], 1)
    assert not first.takes(8), "as many as may be under way"
    handles[1].wait()
    assert not first.takes(8), "the first of them still is"
    handles[0].wait()
    assert first.takes(8)


def test_what_is_forgotten_no_longer_counts_as_under_way() -> None:
    """A recording that failed has begun collectives that never run."""
    first, _ = group(2)
    for _ in range(peers.WINDOW):
        first.sum(parts_of(1, "sum", 2)[0], 1)
    assert not first.takes(8)
    first.forget()
    assert first.takes(8)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_peer_that_does_not_come_is_named(absent: int) -> None:
    ranks = group(3)
    handles = {rank.at: rank.sum(parts_of(1, "sum", 3)[rank.at], 1) for rank in ranks if rank.at != absent}
    for at, handle in handles.items():
        assert ranks[at].late == []
        handle.wait()  # on a device the kernel fails now
        assert ranks[at].late == [absent]


def test_the_error_names_ranks_and_the_deadline() -> None:
    """Of the second attention group the second coordinate is rank 3."""
    mesh = instance_mesh(4, dp=2)
    assert told_late(mesh, 2, {"tp": [], "attn": []}, 300.0) is None
    error = told_late(mesh, 2, {"tp": [], "attn": [1]}, 300.0)
    said = "rank 2 in a collective of ranks 2, 3 through the peers' memory: nothing came from rank 3 for 300 s"
    assert str(error) == said
