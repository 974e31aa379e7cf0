"""What every transfer engine must do. `pair()` gives (writer, reader) that can reach each other."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tessera.core.errors import PeerError
from tessera.transfer.base import Done, Engine

Pair = Callable[[], tuple[Engine, Engine]]
DEADLINE_S = 10.0


def runs(*rows: tuple[int, int, int, int, int]) -> np.ndarray:
    """Copies as [n, 5]."""
    return np.array(rows, np.int64).reshape(-1, 5)


def finish(engine: Engine, tickets: set[int]) -> dict[int, Done]:
    """Polls until all tickets are over."""
    found: dict[int, Done] = {}
    deadline = time.monotonic() + DEADLINE_S
    while tickets - set(found):
        assert time.monotonic() < deadline, f"tickets {tickets - set(found)} never came"
        for done in engine.poll():
            assert done.ticket not in found, "a ticket came twice"
            found[done.ticket] = done
    return found


class Conformance:
    """Inherit and give a `pair` fixture."""

    def test_every_byte_lands_where_its_run_says(self, pair: Pair) -> None:
        writer, reader = pair()
        source = torch.arange(1000, dtype=torch.float32)
        target, other = torch.zeros(400), torch.zeros(10, dtype=torch.float64)
        writer.register(0, source)
        reader.register(0, target)
        reader.register(7, other)
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        first = writer.write(peer, runs((0, 40, 0, 400, 80), (0, 2000, 0, 0, 4)))
        second = writer.write(peer, runs((0, 0, 7, 8, 16)))
        done = finish(writer, {first, second})
        assert all(d.error is None for d in done.values())
        expected = torch.zeros(400)
        expected[100:120], expected[0] = source[10:30], source[500]
        assert torch.equal(target, expected)
        assert torch.equal(other.view(torch.float32)[2:6], source[:4])
        assert not other.view(torch.float32)[6:].any()

    def test_a_fenced_writer_writes_nothing_more(self, pair: Pair) -> None:
        writer, reader = pair()
        target = torch.zeros(8, dtype=torch.uint8)
        writer.register(0, torch.ones(8, dtype=torch.uint8))
        reader.register(0, target)
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        posted = writer.write(peer, runs((0, 0, 0, 0, 8)))
        reader.fence(writer.name)
        landed = target.clone()
        target.fill_(9)  # the memory is somebody else's now
        again = writer.write(peer, runs((0, 0, 0, 0, 8)))
        done = finish(writer, {posted, again})
        assert torch.equal(target, torch.full_like(target, 9)), f"a write landed after the fence (before: {landed})"
        assert isinstance(done[again].error, PeerError)
        finish(writer, {writer.write(writer.connect(reader.endpoint(), DEADLINE_S), runs((0, 0, 0, 0, 4)))})
        assert target.tolist() == [1, 1, 1, 1, 9, 9, 9, 9], "a new connection lifts the fence"

    def test_a_peer_that_left_is_an_error_of_the_ticket(self, pair: Pair) -> None:
        writer, reader = pair()
        writer.register(0, torch.ones(8))
        reader.register(0, torch.zeros(8))
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        reader.close()
        reader.close()
        ticket = writer.write(peer, runs((0, 0, 0, 0, 8)))
        assert isinstance(finish(writer, {ticket})[ticket].error, PeerError)

    def test_nobody_is_nobody(self, pair: Pair) -> None:
        writer, reader = pair()
        endpoint = reader.endpoint()
        reader.close()
        with pytest.raises((PeerError, TimeoutError)):
            writer.connect(endpoint, 0.5)

    @pytest.mark.parametrize(
        "bad",
        [(0, 0, 0, 28, 8), (0, 28, 0, 0, 8), (0, -4, 0, 0, 4), (1, 0, 0, 0, 4), (0, 0, 3, 0, 4), (0, 8, 0, 8, -4)],
    )
    def test_a_run_outside_a_region_is_refused(self, pair: Pair, bad: tuple[int, int, int, int, int]) -> None:
        writer, reader = pair()
        writer.register(0, torch.zeros(8))
        reader.register(0, torch.zeros(8))
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        with pytest.raises(ValueError, match="region"):
            writer.write(peer, runs((0, 0, 0, 0, 4), bad))
