"""The memory that ranks of a host share: nothing overlaps, counters wrap, places are not reused too early."""

from __future__ import annotations

import mmap
import platform
import threading
import time
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comm.ranks import place, raise_first, together
from ports import free_port
from tessera.comm import segment, shared
from tessera.comm.connect import connect
from tessera.comm.futex import Counter, check_platform
from tessera.comm.segment import DEPTH, MEMBERS, MESSAGE_BYTES, Segment, plan
from tessera.comm.shared import SharedComm
from tessera.core.errors import CapacityError, ConfigError
from tessera.core.mesh import Mesh, instance_mesh
from waits import PATIENCE_S


@given(st.sampled_from([(8, 2, 4), (4, 2, 2), (6, 3, 2), (2, 1, 1), (16, 4, 8)]))
def test_nothing_overlaps(sizes: tuple[int, int, int]) -> None:
    tp, dp, ep = sizes
    made = plan(instance_mesh(tp, dp=dp, ep=ep))
    slots = range(made.slots)
    spans = [(16, 16 + tp)]
    spans += [(made.counters(slot), made.counters(slot) + 128) for slot in slots]
    spans += [(made.message(s, t), made.message(s, t) + MESSAGE_BYTES) for s in slots for t in range(DEPTH)]
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] == made.size
    members = [made.groups[ranks] + i for ranks in made.groups for i in range(len(ranks))]
    assert sorted(members) == list(slots)


@pytest.fixture
def counter() -> Counter:
    return Counter(mmap.mmap(-1, 4096), 64)


@pytest.mark.parametrize("start", [0, 2**31 - 2, 2**32 - 2])
def test_a_counter_wraps(counter: Counter, start: int) -> None:
    counter.set(start)
    for count in range(start, start + 5):
        counter.set(count)
        assert counter.reached(count)
        assert counter.reached(count - DEPTH)
        assert not counter.reached(count + 1)


def test_a_wait_ends_when_the_count_comes(counter: Counter) -> None:
    later = threading.Timer(0.3, counter.set, (1,))
    later.start()
    limit, spun = time.monotonic() + PATIENCE_S, time.thread_time()
    woken = [counter.wait(1, 0.99)]
    while not woken[-1]:
        assert time.monotonic() < limit
        woken.append(counter.wait(1, 0.99))
    assert time.thread_time() - spun < 0.1, "it did not sleep"
    later.join()
    assert not counter.wait(2, 0.01)


def test_a_wait_is_woken() -> None:
    """By the count and not by the end of its time: of many waits that each end soon after they began, one at least."""
    counter = Counter(mmap.mmap(-1, 4096), 64)
    quickest = PATIENCE_S
    for count in range(1, 6):
        threading.Timer(0.05, counter.set, (count,)).start()
        began = time.monotonic()
        while not counter.wait(count, 0.99):
            assert time.monotonic() - began < PATIENCE_S
        quickest = min(quickest, time.monotonic() - began)
    assert quickest < 0.9


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match=r"needs Linux on x86-64, this is linux on aarch64\. Use gloo"):
        check_platform()


def test_a_message_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Segment.create(instance_mesh(2))
    large = torch.empty(1).expand(MESSAGE_BYTES // 4)
    with pytest.raises(CapacityError, match="use smaller steps"):
        made.write(0, 0, 1, [large])
    made.seal()


def test_too_many_ranks() -> None:
    with pytest.raises(ConfigError, match=f"at most {MEMBERS} ranks share memory, not 64"):
        plan(instance_mesh(64))


def test_other_memory_is_not_taken_for_ours() -> None:
    mesh = instance_mesh(2)
    made = Segment.create(mesh)
    attached = Segment.attach(mesh, 1, made.path, made.nonce)
    attached.leave(1)
    assert made.has_left(1)
    assert not made.has_left(0)
    for path, nonce in ((made.path, b"0" * 16), ("/proc/1/fd/999", made.nonce)):
        with pytest.raises(ConfigError, match=r"is it on another host, or in another container\?.*Use gloo"):
            Segment.attach(mesh, 1, path, nonce)
    attached.seal()
    made.seal()


def joined(mesh: Mesh, **more: Any) -> list[SharedComm]:
    """Ranks as threads of this process: the memory does not mind."""
    port = free_port()
    comms = together([partial(connect, place(mesh, rank, "shared", port, **more)) for rank in range(mesh.size)])
    raise_first(comms)
    return comms


def fast_and_slow(rounds: int, patience_s: float) -> list[Any]:
    """Rank 1 begins DEPTH collectives and then waits for rank 0 to begin all of its own, before it reads any."""
    fast, slow = joined(instance_mesh(2))
    channel = fast._channels["tp"]

    def sums(comm: SharedComm) -> list[float]:
        handles, until = [], time.monotonic() + patience_s
        for i in range(rounds):
            while comm is slow and i == DEPTH and channel._count < rounds and time.monotonic() < until:
                time.sleep(0.001)
            handles.append(comm.sum([torch.full((4,), float(i))], "tp"))
        return [handle.wait()[0].item() for handle in handles]

    results = together([partial(sums, fast), partial(sums, slow)])
    fast.close()
    slow.close()
    return results


def test_a_place_is_not_reused_before_all_have_read_it() -> None:
    assert fast_and_slow(3 * DEPTH, patience_s=0.2) == [[2.0 * i for i in range(3 * DEPTH)]] * 2


def test_reusing_a_place_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = shared._Channel._await

    def hasty(channel: Any, counters: Any, count: int, what: str) -> None:
        if counters is not channel._taken:
            wait(channel, counters, count, what)

    monkeypatch.setattr(shared._Channel, "_await", hasty)
    assert fast_and_slow(DEPTH + 1, patience_s=10.0) != [[2.0 * i for i in range(DEPTH + 1)]] * 2


def test_a_handle_that_nobody_waits_for_is_in_nobodys_way() -> None:
    comms = joined(instance_mesh(2))

    def sums(comm: SharedComm) -> float:
        for _ in range(3 * DEPTH):
            comm.sum([torch.zeros(2)], "tp")
        return comm.sum([torch.ones(2)], "tp").wait()[0].item()

    assert together([partial(sums, comm) for comm in comms]) == [2.0, 2.0]
    for comm in comms:
        comm.close()


def test_ranks_in_different_collectives() -> None:
    first, second = joined(instance_mesh(2))
    calls = [lambda: first.sum([torch.ones(2)], "tp").wait(), lambda: second.gather(torch.ones(2), "tp", 0).wait()]
    errors = together(calls)
    assert all(isinstance(e, AssertionError) and "different collectives" in str(e) for e in errors), errors
    first.close()
    second.close()


def test_sums_of_different_shapes_do_not_broadcast() -> None:
    comms = joined(instance_mesh(2))
    errors = together([lambda n=n, c=comm: c.sum([torch.ones(n, 2)], "tp").wait() for n, comm in enumerate(comms, 1)])
    assert all(isinstance(error, AssertionError) for error in errors), errors
    for comm in comms:
        comm.close()


@pytest.mark.parametrize("dtype", segment.DTYPES, ids=str)
def test_every_dtype_is_gathered(dtype: torch.dtype) -> None:
    made = Segment.create(instance_mesh(2))
    part = torch.arange(6).view(2, 3).to(dtype)
    made.write(0, 1, 1, [part])
    (got,) = made.read(0, 1).parts
    made.seal()
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), part.view(torch.uint8))
