"""What every transfer engine must do. `pair()` gives (writer, reader) that can reach each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch

from tessera.core.errors import DeadlineError, PeerError, TesseraError
from tessera.transfer.base import Done, Engine
from tessera.transfer.copies import CopyPlan
from transfer.servers import HYBRID, Memory, Room, check, filled, manifest
from transfer.sides import Side

Pair = Callable[[], tuple[Engine, Engine]]
DEADLINE_S = 60.0
SETTLE_S = 0.3  # what is still under way after a fence would land within this


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
    """Inherit and give a `pair` fixture. `devices`: of the writer's and of the reader's memory."""

    devices: ClassVar[tuple[str, str]] = ("cpu", "cpu")

    def test_every_byte_lands_where_its_run_says(self, pair: Pair) -> None:
        (writer, reader), (here, there) = pair(), self.devices
        source = torch.arange(1000, dtype=torch.float32, device=here)
        target, other = torch.zeros(400, device=there), torch.zeros(10, dtype=torch.float64, device=there)
        writer.register(0, source)
        reader.register(0, target)
        reader.register(7, other)
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        first = writer.write(peer, runs((0, 40, 0, 400, 80), (0, 2000, 0, 0, 4)))
        second = writer.write(peer, runs((0, 0, 7, 8, 16)))
        done = finish(writer, {first, second})
        assert all(d.error is None for d in done.values()), done
        expected = torch.zeros(400)
        expected[100:120], expected[0] = source[10:30].cpu(), source[500].cpu()
        assert torch.equal(target.cpu(), expected)
        assert torch.equal(other.view(torch.float32)[2:6].cpu(), source[:4].cpu())
        assert not other.view(torch.float32)[6:].any()

    def test_a_fenced_writer_writes_nothing_more(self, pair: Pair) -> None:
        (writer, reader), (here, there) = pair(), self.devices
        target = torch.zeros(8, dtype=torch.uint8, device=there)
        writer.register(0, torch.ones(8, dtype=torch.uint8, device=here))
        reader.register(0, target)
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        posted = writer.write(peer, runs((0, 0, 0, 0, 8)))
        reader.fence(writer.name)
        landed = target.clone()
        target.fill_(9)  # the memory is somebody else's now
        again = writer.write(peer, runs((0, 0, 0, 0, 8)))
        done = finish(writer, {posted, again})
        assert set(target.tolist()) == {9}, f"a write landed after the fence (before: {landed})"
        assert isinstance(done[again].error, PeerError)
        ticket = writer.write(writer.connect(reader.endpoint(), DEADLINE_S), runs((0, 0, 0, 0, 4)))
        assert finish(writer, {ticket})[ticket].error is None
        assert target.tolist() == [1, 1, 1, 1, 9, 9, 9, 9], "a new connection lifts the fence"

    def test_a_peer_that_left_is_an_error_of_the_ticket(self, pair: Pair) -> None:
        (writer, reader), (here, there) = pair(), self.devices
        writer.register(0, torch.ones(8, device=here))
        reader.register(0, torch.zeros(8, device=there))
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        reader.close()
        reader.close()
        ticket = writer.write(peer, runs((0, 0, 0, 0, 8)))
        assert isinstance(finish(writer, {ticket})[ticket].error, PeerError)

    def test_who_waits_is_told_and_need_not_ask(self, pair: Pair) -> None:
        (writer, reader), (here, there) = pair(), self.devices
        writer.register(0, torch.ones(8, dtype=torch.uint8, device=here))
        reader.register(0, torch.zeros(8, dtype=torch.uint8, device=there))
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        writer.poll()
        began = time.monotonic()
        writer.wait(None, 0.1)
        assert 0.05 < time.monotonic() - began < DEADLINE_S, "nothing is under way"
        for _ in range(2):  # the second time the reader has left
            ticket, found, asked = writer.write(peer, runs((0, 0, 0, 0, 8))), [], 0
            while not found:
                began, asked = time.monotonic(), asked + 1
                writer.wait(None, DEADLINE_S)
                assert time.monotonic() - began < DEADLINE_S, "it was over and nobody was told"
                found = list(writer.poll())
            assert [done.ticket for done in found] == [ticket]
            assert asked < 10
            reader.close()

    def test_nobody_is_nobody(self, pair: Pair) -> None:
        writer, reader = pair()
        endpoint = reader.endpoint()
        reader.close()
        with pytest.raises((PeerError, TimeoutError)):
            writer.connect(endpoint, 0.5)

    def test_a_run_outside_a_region_is_refused(self, pair: Pair) -> None:
        (writer, reader), (here, there) = pair(), self.devices
        writer.register(0, torch.zeros(8, device=here))
        reader.register(0, torch.zeros(8, device=there))
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        outside = [(0, 0, 0, 28, 8), (0, 28, 0, 0, 8), (0, -4, 0, 0, 4)]
        for bad in [*outside, (1, 0, 0, 0, 4), (0, 0, 3, 0, 4), (0, 8, 0, 8, -4)]:
            with pytest.raises(ValueError, match="region"):
                writer.write(peer, runs((0, 0, 0, 0, 4), bad))
        ticket = writer.write(peer, runs((0, 0, 0, 0, 4)))
        assert finish(writer, {ticket})[ticket].error is None, "a refused batch harms no other"

    def test_random_runs_of_all_lengths(self, pair: Pair) -> None:
        (writer, reader), (here, there) = pair(), self.devices
        rng = np.random.default_rng(0)
        size, num = 1 << 22, 3000
        source = torch.from_numpy(rng.integers(0, 256, size, np.uint8)).to(here)
        target = torch.zeros(size, dtype=torch.uint8, device=there)
        writer.register(3, source)
        reader.register(5, target)
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        borders = np.sort(rng.choice(size, num, replace=False))
        lengths = np.diff(borders) // rng.integers(1, 3, num - 1)  # with gaps
        sources = rng.integers(0, size - lengths.max(), num - 1)
        columns = (np.full(num - 1, 3), sources, np.full(num - 1, 5), borders[:-1], lengths)
        batch = np.stack(columns, 1).astype(np.int64)
        tickets = {writer.write(peer, part) for part in np.array_split(batch[rng.permutation(num - 1)], 4)}
        assert all(done.error is None for done in finish(writer, tickets).values())
        expected, origin = np.zeros(size, np.uint8), source.cpu().numpy()
        for _, at, _, to, length in batch.tolist():
            expected[to : to + length] = origin[at : at + length]
        assert np.array_equal(target.cpu().numpy(), expected)


class Apart(Conformance):
    """For an engine between processes: give `make`, and get processes that can be killed."""

    make: ClassVar[Callable[[], Engine]]
    environ: ClassVar[dict[str, str]] = {}
    repeats: ClassVar[int] = 1  # of each batch that is to take a while

    @pytest.fixture
    def sides(self) -> Iterator[Callable[[], Side]]:
        made: list[Side] = []

        def side() -> Side:
            made.append(Side(type(self).make, self.environ))
            return made[-1]

        yield side
        for each in made:
            each.end()

    @pytest.fixture
    def pair(self, sides: Callable[[], Side]) -> Pair:
        return lambda: (sides(), sides())

    def busy(self, pair: Pair, count: int = 32) -> tuple[Side, Side, torch.Tensor, set[int]]:
        """A writer with batches under way that take a while, on a busy machine, too; its reader, the target and the
        tickets."""
        writer, reader = pair()
        source = torch.ones(1 << 26, dtype=torch.uint8, device=self.devices[0])
        target = torch.zeros(1 << 26, dtype=torch.uint8, device=self.devices[1])
        writer.register(0, source)
        reader.register(0, target)
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        at = np.arange(0, 1 << 26, 1 << 16)
        batch = np.tile(np.stack([0 * at, at, 0 * at, at, 0 * at + (1 << 16)], 1), (self.repeats, 1))
        tickets = {writer.write(peer, batch) for _ in range(count)}
        return writer, reader, target, tickets

    def untouched(self, target: torch.Tensor) -> None:
        """The memory is somebody else's now, and stays as that one leaves it."""
        target.fill_(9)
        time.sleep(SETTLE_S)
        assert (target == 9).all(), "a write landed after the fence"

    def test_a_fence_amid_a_batch(self, pair: Pair) -> None:
        writer, reader, target, tickets = self.busy(pair)
        reader.fence(writer.name, DEADLINE_S)
        self.untouched(target)
        done = finish(writer, tickets)
        assert any(isinstance(d.error, PeerError) for d in done.values()), "all had landed: the test proves nothing"

    def test_a_killed_writer_is_fenced(self, pair: Pair) -> None:
        writer, reader, target, _ = self.busy(pair)
        writer.kill()
        reader.fence(writer.name, DEADLINE_S)
        self.untouched(target)

    def test_a_hanging_writer_is_fenced_or_its_memory_is_in_doubt(self, pair: Pair) -> None:
        writer, reader, target, _ = self.busy(pair)
        writer.pause()
        try:
            reader.fence(writer.name, 1.0)
            fenced = True
        except DeadlineError:
            fenced = False
        if fenced:
            self.untouched(target)
        writer.resume()
        reader.fence(writer.name, DEADLINE_S)
        self.untouched(target)

    def test_a_killed_reader_fails_what_is_under_way(self, pair: Pair) -> None:
        writer, reader, _, tickets = self.busy(pair)
        reader.kill()
        assert any(isinstance(d.error, PeerError) for d in finish(writer, tickets).values())

    def test_the_writer_never_waits(self, pair: Pair) -> None:
        """A reader that hangs takes nothing from the socket: posting and polling return all the same."""
        writer, reader, target, tickets = self.busy(pair, 1)
        (peer,) = {writer.connect(reader.endpoint(), DEADLINE_S)}
        finish(writer, tickets)
        reader.pause()
        batch = np.tile(runs((0, 0, 0, 0, 1)), (10_000, 1))
        batch[:, 1] = batch[:, 3] = np.arange(10_000)
        began = time.monotonic()
        tickets = {writer.write(peer, batch) for _ in range(3)}
        assert writer.poll() == []
        assert time.monotonic() - began < DEADLINE_S / 2, "it waited for the reader"
        target.zero_()
        reader.resume()
        assert all(d.error is None for d in finish(writer, tickets).values())
        assert target[:10_000].all()
        assert not target[10_000:].any()

    def test_a_fence_is_for_one_writer(self, sides: Callable[[], Side]) -> None:
        (here, there), reader = self.devices, sides()
        target = torch.zeros(16, dtype=torch.uint8, device=there)
        reader.register(0, target)
        writers = [sides(), sides()]
        for i, writer in enumerate(writers):
            writer.register(0, torch.full((8,), i + 1, dtype=torch.uint8, device=here))
        peers = [writer.connect(reader.endpoint(), DEADLINE_S) for writer in writers]
        reader.fence(writers[0].name)
        errors = []
        for i, (writer, peer) in enumerate(zip(writers, peers, strict=True)):
            ticket = writer.write(peer, runs((0, 0, 0, 8 * i, 8)))
            errors.append(finish(writer, {ticket})[ticket].error)
        assert isinstance(errors[0], PeerError)
        assert errors[1] is None
        assert target.tolist() == [0] * 8 + [2] * 8
        reader.fence("nobody")

    def test_a_successor_is_somebody_else(self, sides: Callable[[], Side]) -> None:
        (here, there), writer, first = self.devices, sides(), sides()
        writer.register(0, torch.ones(8, dtype=torch.uint8, device=here))
        first.register(0, torch.zeros(8, dtype=torch.uint8, device=there))
        endpoint = first.endpoint()
        writer.connect(endpoint, DEADLINE_S)
        first.kill()
        with pytest.raises(TesseraError):
            writer.connect(endpoint, 1.0)
        second, target = sides(), torch.zeros(8, dtype=torch.uint8, device=there)
        second.register(0, target)
        peer = writer.connect(second.endpoint(), DEADLINE_S)
        assert peer == second.name != first.name
        ticket = writer.write(peer, runs((0, 0, 0, 0, 8)))
        assert finish(writer, {ticket})[ticket].error is None
        assert target.all()

    @pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
    def test_a_sequence_moves_between_two_layouts(self, sides: Callable[[], Side], sizes: tuple[int, int]) -> None:
        """The whole way: pools of two servers, one engine a rank, runs from the plan of copies."""
        room = Room(0, 0, [3, 4, 7], [2, 3, 1], 2, 4)
        servers = [manifest(HYBRID, size) for size in sizes]
        src, truth = filled(servers[0], room)
        dst = Memory(servers[1])
        engines, pools = [], []
        for memory, device in zip((src, dst), self.devices, strict=True):
            pools.append(
                [{n: torch.from_numpy(b).to(device).clone() for n, b in held.items()} for held in memory.bytes]
            )
            engines.append([sides() for _ in memory.bytes])
            for engine, regions in zip(engines[-1], pools[-1], strict=True):
                for number, region in regions.items():
                    engine.register(number, region)
        plan = CopyPlan(*servers)
        for a, b in plan.pairs(0, 0):
            peer = engines[0][a].connect(engines[1][b].endpoint(), DEADLINE_S)
            paged, slots = plan.paged(a, b, room.src_pages, room.dst_pages), plan.slots(a, b, 2, 4)
            ticket = engines[0][a].write(peer, np.concatenate([paged, slots]))
            assert finish(engines[0][a], {ticket})[ticket].error is None
        for held, regions in zip(dst.bytes, pools[1], strict=True):
            for number, region in regions.items():
                held[number][:] = region.cpu().numpy()
        check(dst, room, servers[0], truth)
