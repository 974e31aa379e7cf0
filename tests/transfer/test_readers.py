"""Where a device copies, batches are under way: in order, told once they have landed, waited for by a fence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tessera.core.errors import DeadlineError, PeerError
from tessera.transfer import readers
from tessera.transfer.base import PerRegion
from tessera.transfer.host import HostMover
from tessera.transfer.pull import PullEngine
from transfer.conformance import DEADLINE_S, SETTLE_S, Conformance, finish, runs
from transfer.movers import Make, Stream, making

engines = pytest.fixture(making)


class TestOnAStream(Conformance):
    @pytest.fixture
    def pair(self, engines: Make) -> Callable[[], tuple[PullEngine, PullEngine]]:
        return lambda: (engines(HostMover()), engines(Stream()))


def queued(engines: Make, stream: Stream, num: int) -> tuple[PullEngine, PullEngine, torch.Tensor, list[int]]:
    """A writer, a reader, its memory of a byte a batch, and the tickets of that many batches."""
    writer, reader, target = engines(HostMover()), engines(stream), torch.zeros(num, dtype=torch.uint8)
    writer.register(0, torch.ones(num, dtype=torch.uint8))
    reader.register(0, target)
    peer = writer.connect(reader.endpoint(), DEADLINE_S)
    with stream.door:  # all have come when the first is begun
        return writer, reader, target, [writer.write(peer, runs((0, i, 0, i, 1))) for i in range(num)]


def until(told: Callable[[], bool]) -> None:
    """Waits until it is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not told():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def test_the_next_batch_is_begun_before_the_first_is_over(engines: Make) -> None:
    """So that the wire is not idle between two; no more than that, for a fence waits for all of them."""
    stream = Stream()
    with stream.hold:
        writer, _, target, tickets = queued(engines, stream, 6)
        until(lambda: len(stream.under_way) > readers.AHEAD)
        time.sleep(SETTLE_S)
        assert stream.under_way == list(range(readers.AHEAD + 1))
        assert writer.poll() == []
        assert not target.any()
    assert [done.error for done in finish(writer, set(tickets)).values()] == [None] * 6
    assert target.all()
    assert max(stream.under_way) == readers.AHEAD


def test_batches_under_way_are_told_in_order_and_once_they_have_landed(engines: Make) -> None:
    writer, _, target, tickets = queued(engines, Stream(), 40)
    found: list[int] = []
    until(lambda: bool(found.extend(done.ticket for done in writer.poll())) or len(found) == 40)
    assert found == tickets
    assert target.all()


def test_a_fence_waits_for_every_batch_under_way(engines: Make) -> None:
    stream = Stream()
    with stream.hold:
        writer, reader, target, tickets = queued(engines, stream, 6)
        until(lambda: len(stream.under_way) > readers.AHEAD)
        with pytest.raises(DeadlineError, match="in doubt"):
            reader.fence(writer.name, 0.05)
    reader.fence(writer.name, DEADLINE_S)
    assert target.tolist() == [1] * readers.AHEAD + [0] * (6 - readers.AHEAD), "begun, and nothing else"
    assert all(isinstance(done.error, PeerError) for done in finish(writer, set(tickets)).values())


def test_a_batch_that_fails_takes_none_before_it_along(engines: Make) -> None:
    """Its copies are refused while those of the first are under way, or fail while they are waited for."""
    stream = Stream()
    writer, reader = engines(HostMover()), engines(stream)
    writer.register(0, torch.ones(64, dtype=torch.uint8))
    reader.register(0, torch.zeros(8, dtype=torch.uint8))
    peer = writer.connect(reader.endpoint(), DEADLINE_S)
    writer._peers[peer].sizes = PerRegion({0: 64}, {0: 64})
    with stream.hold:
        good = writer.write(peer, runs((0, 0, 0, 0, 8)))
        bad, after = (writer.write(peer, runs((0, 0, 0, 0, n))) for n in (64, 8))
    done = finish(writer, {good, bad, after})
    assert done[good].error is None
    assert "has 8 bytes" in str(done[bad].error)
    assert isinstance(done[after].error, PeerError)


def test_mutant_a_batch_is_told_when_it_is_launched(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = readers.Writer._begin

    def hasty(self: readers.Writer, *given: object) -> str | None:
        error = begin(self, *given)  # type: ignore[arg-type]
        self._under_way.append((self._under_way.pop()[0], None))
        return error

    monkeypatch.setattr(readers.Writer, "_begin", hasty)
    stream = Stream()
    with stream.hold:
        writer, _, target, tickets = queued(engines, stream, 1)
        assert finish(writer, set(tickets))[tickets[0]].error is None
        assert not target.any(), "the fault would go unseen"


@pytest.mark.parametrize("mover", [HostMover, Stream])
def test_a_storm_of_fences(engines: Make, mover: type[HostMover]) -> None:
    """Writers connect, post and are fenced at any moment; what was given to somebody else is never written."""
    rng = np.random.default_rng(0)
    size = 1 << 20
    reader, target = engines(mover()), torch.zeros(2 * size, dtype=torch.uint8)
    reader.register(0, target)
    writers = [engines(HostMover()) for _ in range(2)]
    peers = ["", ""]
    for i, writer in enumerate(writers):
        writer.register(0, torch.full((size,), i + 1, dtype=torch.uint8))
    fenced, landed = 0, 0
    for _ in range(60):
        i = int(rng.integers(2))
        writer, own = writers[i], target[i * size : (i + 1) * size]
        peers[i] = writer.connect(reader.endpoint(), DEADLINE_S)
        at = np.arange(0, size, 1 << 12)
        batch = np.stack([0 * at, at, 0 * at, i * size + at, 0 * at + (1 << 12)], 1)
        tickets = {writer.write(peers[i], batch) for _ in range(int(rng.integers(1, 8)))}
        time.sleep(float(rng.choice([0, 1e-4, 1e-3])))
        reader.fence(writer.name, DEADLINE_S)
        own.fill_(9)
        done = finish(writer, tickets)
        fenced += sum(d.error is not None for d in done.values())
        landed += sum(d.error is None for d in done.values())
        assert (own == 9).all(), "a write landed after the fence"
    assert min(fenced, landed) > 0, "the storm was none"


def test_nobody_is_at_the_door_when_it_is_closed(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known fault: a thread that still ended while the interpreter did aborted the process."""
    take = readers.Readers._accept
    monkeypatch.setattr(readers.Readers, "_accept", lambda self: (take(self), time.sleep(SETTLE_S)))
    engine = engines(HostMover())
    engine.endpoint()
    engine.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.endswith(" door")]
