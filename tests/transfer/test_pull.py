"""The side that is written copies: what it may be told, by whom, and what a fence waits for. Without any clock."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import torch

from tessera.core.errors import ConfigError, DeadlineError, PeerError
from tessera.transfer import engines as engine_table
from tessera.transfer import readers, wire
from tessera.transfer.base import PerRegion, Runs
from tessera.transfer.engines import make_engine
from tessera.transfer.host import HostMover, HostSource
from tessera.transfer.mover import Regions, addressed, calls
from tessera.transfer.pull import PullEngine
from tessera.transfer.wire import Batch, Endpoint, Heard, Hello, Parting, Welcome, dial, pack
from transfer.conformance import DEADLINE_S, Conformance, finish, runs
from transfer.movers import Gate, Make, making

engines = pytest.fixture(making)


def started(engines: Make) -> tuple[PullEngine, PullEngine, Gate, torch.Tensor, int]:
    """A writer and a reader whose copy has begun and waits: (writer, reader, gate, target, ticket)."""
    gate = Gate()
    writer, reader = engines(HostMover()), engines(gate)
    target = torch.zeros(8, dtype=torch.uint8)
    writer.register(0, torch.ones(8, dtype=torch.uint8))
    reader.register(0, target)
    ticket = writer.write(writer.connect(reader.endpoint(), DEADLINE_S), runs((0, 0, 0, 0, 8)))
    assert gate.begun.wait(DEADLINE_S)
    return writer, reader, gate, target, ticket


def test_a_fence_waits_for_the_copy_under_way(engines: Make) -> None:
    writer, reader, gate, target, ticket = started(engines)
    with pytest.raises(DeadlineError, match="in doubt"):
        reader.fence(writer.name, 0.05)
    assert writer.poll() == []
    gate.let.set()
    reader.fence(writer.name, DEADLINE_S)
    assert gate.closed == 1, "the source is torn down before the fence returns"
    assert target.all(), "it had landed"
    error = finish(writer, {ticket})[ticket].error
    assert isinstance(error, PeerError), "the writer is told that it is fenced, landed or not"


def test_mutant_a_fence_that_only_says_no(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses what comes later, and does not wait for what is under way: someone else's bytes are overwritten."""
    monkeypatch.setattr(readers.Writer, "retire", lambda self, deadline_s: self.stop.set() or True)
    writer, reader, gate, target, ticket = started(engines)
    reader.fence(writer.name, DEADLINE_S)
    target.fill_(9)
    gate.let.set()
    finish(writer, {ticket})
    assert not (target == 9).all(), "the fault would go unseen"


def test_a_writer_that_comes_back_waits_for_its_own_copy(engines: Make) -> None:
    """Two connections of one writer never copy side by side."""
    writer, reader, gate, _, ticket = started(engines)
    for _ in range(3):
        with pytest.raises(DeadlineError, match="welcome"):
            writer.connect(reader.endpoint(), 0.1)
    gate.let.set()
    peer = writer.connect(reader.endpoint(), DEADLINE_S)
    again = writer.write(peer, runs((0, 0, 0, 0, 8)))
    done = finish(writer, {ticket, again})
    assert isinstance(done[ticket].error, PeerError)
    assert done[again].error is None
    assert gate.closed >= 1


def test_a_connection_that_is_being_admitted_is_fenced_too(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = engines(HostMover()), engines(HostMover())
    opening, go_on, target = threading.Event(), threading.Event(), torch.zeros(8, dtype=torch.uint8)
    right = HostMover.open

    def slow(self: HostMover, exported: bytes, own: Regions) -> HostSource:
        opening.set()
        assert go_on.wait(DEADLINE_S)
        return right(self, exported, own)

    monkeypatch.setattr(HostMover, "open", slow)
    writer.register(0, torch.ones(8, dtype=torch.uint8))
    reader.register(0, target)
    with ThreadPoolExecutor(2) as pool:
        connecting = pool.submit(writer.connect, reader.endpoint(), DEADLINE_S)
        assert opening.wait(DEADLINE_S)
        with pytest.raises(DeadlineError, match="being admitted"):
            reader.fence(writer.name, 0.05)
        fencing = pool.submit(reader.fence, writer.name, DEADLINE_S)
        time.sleep(0.05)
        assert not fencing.done()
        go_on.set()
        fencing.result()
        peer = connecting.result()
    ticket = writer.write(peer, runs((0, 0, 0, 0, 8)))
    assert isinstance(finish(writer, {ticket})[ticket].error, PeerError)
    assert not target.any()


def test_mutant_an_engine_without_a_fence(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PullEngine, "fence", lambda self, writer: None)
    with pytest.raises(AssertionError, match="after the fence"):
        Conformance().test_a_fenced_writer_writes_nothing_more(lambda: (engines(HostMover()), engines(HostMover())))


def test_closing_the_reader_waits_for_the_copy_under_way(engines: Make) -> None:
    writer, reader, gate, target, ticket = started(engines)
    threading.Timer(0.1, gate.let.set).start()
    reader.close()
    assert target.all()
    assert isinstance(finish(writer, {ticket})[ticket].error, PeerError)


def test_a_copy_that_fails_is_told_with_its_reason(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HostSource, batch: Runs, stop: threading.Event) -> None:
        raise PeerError("the cable is cut")

    writer, reader = engines(HostMover()), engines(HostMover())
    writer.register(0, torch.ones(8))
    reader.register(0, torch.zeros(8))
    peer = writer.connect(reader.endpoint(), DEADLINE_S)
    monkeypatch.setattr(HostSource, "copy", fail)
    tickets = {writer.write(peer, runs((0, 0, 0, 0, 8))) for _ in range(2)}
    done = finish(writer, tickets)
    assert all("the cable is cut" in str(d.error) for d in done.values())


def hello(reader: PullEngine, **fields: object) -> wire.Message | None:
    """What the reader answers to a first word that differs in some fields; None when it just closes."""
    there = msgspec.msgpack.decode(reader.endpoint(), type=Endpoint)
    said = {"protocol": wire.PROTOCOL, "kind": "local", "name": "me", "to": there.name, "sizes": {}, "exported": b""}
    with dial(there.address, DEADLINE_S) as sock:
        sock.sendall(pack(Hello(**{**said, **fields})))  # type: ignore[arg-type]
        return Heard(sock).next()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"protocol": 1}, "local with transfer protocol 2"),
        ({"kind": "nixl"}, "local with transfer protocol 2"),
        ({"to": "local-1-ff"}, "local-1-ff is not here any more"),
        ({"exported": b""}, "truncated"),
        ({"exported": msgspec.msgpack.encode({"pid": 1 << 30, "starts": {}, "proof": 8, "nonce": b"x"})}, "has left"),
        ({"exported": msgspec.msgpack.encode({"pid": 1, "starts": {}, "proof": 8, "nonce": b"x"})}, "process 1"),
    ],
)
def test_who_may_not_write_is_told_why(engines: Make, fields: dict[str, object], words: str) -> None:
    answer = hello(engines(HostMover()), **fields)
    assert isinstance(answer, Welcome)
    assert words in (answer.error or "")


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, pack(Batch(0, b"")), b"\0\0\0\0"])
def test_what_is_no_greeting_is_answered_with_a_refusal(engines: Make, first: bytes) -> None:
    there = msgspec.msgpack.decode(engines(HostMover()).endpoint(), type=Endpoint)
    with dial(there.address, DEADLINE_S) as sock:
        sock.sendall(first)
        sock.shutdown(socket.SHUT_WR)
        answer = Heard(sock).next()
    assert isinstance(answer, Welcome)
    assert answer.error


def test_a_batch_that_leaves_its_regions_is_refused_by_the_reader_too(engines: Make) -> None:
    """Whoever speaks the protocol cannot write where nothing was registered."""
    writer, reader = engines(HostMover()), engines(HostMover())
    writer.register(0, torch.ones(64, dtype=torch.uint8))
    reader.register(0, torch.zeros(8, dtype=torch.uint8))
    peer = writer.connect(reader.endpoint(), DEADLINE_S)
    lying = writer._peers[peer]
    lying.sizes = PerRegion({0: 64}, {0: 64})
    ticket = writer.write(peer, runs((0, 0, 0, 0, 64)))
    assert "has 8 bytes" in str(finish(writer, {ticket})[ticket].error)


def test_an_endpoint_of_another_engine_is_refused(engines: Make) -> None:
    writer = engines(HostMover())
    other = Endpoint("nixl", wire.PROTOCOL, "nixl-1-1", "127.0.0.1:1", {})
    with pytest.raises(PeerError, match="is nixl with protocol 2, this side local"):
        writer.connect(msgspec.msgpack.encode(other), 1.0)
    with pytest.raises(PeerError, match="not the endpoint"):
        writer.connect(b"nonsense", 1.0)
    with pytest.raises(ValueError, match="no peer"):
        writer.write("nobody", runs())


def test_a_reader_that_says_nothing_has_a_deadline(engines: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = Endpoint("local", wire.PROTOCOL, "local-1-1", f"127.0.0.1:{silent.getsockname()[1]}", {})
        with pytest.raises(DeadlineError, match="did not say welcome within"):
            engines(HostMover()).connect(msgspec.msgpack.encode(there), 0.1)


def test_a_visitor_that_says_nothing_is_sent_away(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "HELLO_S", 0.05)
    there = msgspec.msgpack.decode(engines(HostMover()).endpoint(), type=Endpoint)
    with dial(there.address, DEADLINE_S) as sock:
        assert sock.recv(1) == b""


def test_a_writer_that_does_not_listen_is_given_up(engines: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SAY_S", 0.1)
    reader, mover, memory = engines(HostMover()), HostMover(), torch.zeros(8, dtype=torch.uint8)
    there = msgspec.msgpack.decode(reader.endpoint(), type=Endpoint)
    hello = Hello(wire.PROTOCOL, "local", "deaf", there.name, {0: 8}, mover.export({0: memory}))
    with dial(there.address, DEADLINE_S) as sock:
        sock.sendall(pack(hello))
        assert Heard(sock).next() == Welcome()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall(100_000 * pack(Batch(0, b"")))
    reader.fence("deaf", DEADLINE_S)


def test_a_writer_that_says_no_message_is_given_up_with_the_reason(engines: Make) -> None:
    reader, mover = engines(HostMover()), HostMover()
    there = msgspec.msgpack.decode(reader.endpoint(), type=Endpoint)
    hello = Hello(wire.PROTOCOL, "local", "babbler", there.name, {}, mover.export({}))
    with dial(there.address, DEADLINE_S) as sock:
        sock.settimeout(DEADLINE_S)
        sock.sendall(pack(hello))
        heard = Heard(sock)
        assert heard.next() == Welcome()
        sock.sendall(b"\xff" * 8)
        parting = heard.next()
    assert isinstance(parting, Parting)
    assert "gives this side up: a message of" in parting.reason


class OverTcp(HostMover):
    """The same, met by TCP."""

    host = "127.0.0.1"  # type: ignore[assignment]


class TestMetByTcp(Conformance):
    @pytest.fixture
    def pair(self, engines: Make) -> Callable[[], tuple[PullEngine, PullEngine]]:
        return lambda: (engines(OverTcp()), engines(OverTcp()))


def test_a_message_may_come_in_any_pieces() -> None:
    sent = [Welcome("no"), Batch(3, b"x" * 1000), Parting("left")]
    data = b"".join(map(pack, sent))
    for size in (1, 7, 1000, len(data)):
        inbox = wire.Inbox()
        found = [m for at in range(0, len(data), size) for m in inbox.take(data[at : at + size])]
        assert found == sent


def test_long_runs_are_cut_and_calls_are_bounded() -> None:
    batch = runs((1, 10, 2, 20, 25), (3, 0, 2, 100, 7), (1, 5, 2, 200, 0))
    src, dst, lengths = addressed(batch, PerRegion({1: 1000, 3: 5000}, {2: 9000}), 10)
    assert src.tolist() == [1010, 1020, 1030, 5000, 1005]
    assert dst.tolist() == [9020, 9030, 9040, 9100, 9200]
    assert lengths.tolist() == [10, 10, 5, 7, 0]
    sizes = np.array([3, 3, 3, 50, 1, 1, 1], np.uint64)
    assert [sizes[c].tolist() for c in calls(sizes, 3, 7)] == [[3, 3], [3], [50], [1, 1, 1]]
    assert [sizes[c].tolist() for c in calls(sizes, 2, 1000)] == [[3, 3], [3, 50], [1, 1], [1]]
    assert list(calls(sizes[:0], 3, 7)) == []


def test_an_engine_that_is_not_known_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"--disaggregation-transfer-backend warp: .* Choose one of local, cuda_ipc, mooncake"
    ):
        make_engine("warp")


def test_memory_of_a_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"regions on meta.*Use cuda_ipc"):
        HostMover().export({0: torch.zeros(8, dtype=torch.uint8, device="meta")})


@pytest.mark.parametrize(("asked", "found"), [("0.0.0.0", "10.1.2.3"), ("", "10.1.2.3"), ("10.9.9.9", "10.9.9.9")])
def test_peers_are_told_an_address_they_can_reach(monkeypatch: pytest.MonkeyPatch, asked: str, found: str) -> None:
    told = []
    monkeypatch.setitem(engine_table.MOVERS, "tcp", lambda host, devices: told.append(host) or OverTcp())
    monkeypatch.setattr(engine_table, "outward", lambda host: "10.1.2.3")
    make_engine("tcp", asked)
    assert told == [found]


def test_this_host_has_an_address() -> None:
    assert engine_table.outward("0.0.0.0").count(".") == 3


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr("tessera.transfer.optional.import_module", missing)
    for kind in ("mooncake", "nixl"):
        with pytest.raises(ConfigError, match=rf"backend {kind}: .*No module named .*tessera-llm\[{kind}\]"):
            make_engine(kind)


def test_polling_is_cheap(engines: Make) -> None:
    """It is called with every step."""
    writer, reader = engines(HostMover()), engines(HostMover())
    writer.connect(reader.endpoint(), DEADLINE_S)
    began = time.thread_time()
    for _ in range(1000):
        writer.poll()
    assert time.thread_time() - began < 1.0, "a poll takes more than 1 ms"


def test_a_batch_that_the_socket_does_not_take_at_once_goes_when_it_does(
    engines: Callable[[HostMover], PullEngine],
) -> None:
    gate = Gate()
    writer, reader = engines(HostMover()), engines(gate)
    writer.register(0, torch.ones(8, dtype=torch.uint8))
    reader.register(0, torch.zeros(1 << 18, dtype=torch.uint8))
    peer = writer.connect(reader.endpoint(), DEADLINE_S)
    at = np.arange(1 << 18)
    many = np.stack([0 * at, 0 * at, 0 * at, at, 0 * at + 1], 1)  # 10 MiB of runs
    tickets = {writer.write(peer, runs((0, 0, 0, 0, 1))), writer.write(peer, many)}
    assert gate.begun.wait(DEADLINE_S)
    assert writer.poll() == []
    gate.let.set()
    found: set[int] = set()
    while found != tickets:
        began = time.monotonic()
        writer.wait(None, DEADLINE_S)
        assert time.monotonic() - began < DEADLINE_S, "what is left of the batch was forgotten"
        found |= {done.ticket for done in writer.poll()}
