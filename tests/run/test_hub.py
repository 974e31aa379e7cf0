"""Who may end an instance by leaving: its ranks, and nobody else who finds the port."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator

import pytest
import zmq

from ports import free_port
from tessera.core.errors import ConfigError, PeerError
from tessera.run.hosts import Placed
from tessera.run.hub import Hub
from tessera.run.wire import Down, End, Failed, Hello, Loading, decode_down, encode
from waits import NOTICED_S, PATIENCE_S

HOSTS = [Placed(2, 2, host, f"host {host}") for host in range(2)]
IN_USE = Placed(2, 2, 1, "late")
MISFITS = {1: IN_USE, 2: Placed(4, 4, 2, "late"), 3: Placed(4, 2, 1, "late")}  # by the numbers of their ranks


def rubbish(port: int) -> None:
    """Clients that connect and leave: one says nothing, one speaks HTTP, others say anything, also in the letters of
    the oldest ZeroMQ, which had no greeting."""
    said = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x01\x00\x02\x00x", b"\x03\x001/\x02\x00x"]
    for text in (*said, *(random.Random(seed).randbytes(4096) for seed in range(5))):
        with contextlib.suppress(ConnectionError, TimeoutError), socket.create_connection(("127.0.0.1", port), 5) as it:
            it.sendall(text)
            it.settimeout(0.1)
            it.recv(1)


class Peers:
    """Connections to a hub, as ranks of other hosts make them."""

    def __init__(self, port: int) -> None:
        self.context, self.port = zmq.Context(), port

    def come(self, name: bytes, *said: bytes) -> zmq.Socket[bytes]:
        link = self.context.socket(zmq.DEALER)
        link.routing_id, link.linger = name, 0
        link.connect(f"tcp://127.0.0.1:{self.port}")
        for one in said:
            link.send(one)
        return link


def heard(link: zmq.Socket[bytes]) -> Down:
    assert link.poll(PATIENCE_S * 1000)
    message: Down = decode_down(link.recv())
    return message


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def hub(port: int) -> Iterator[Hub]:
    made = Hub(2, f"127.0.0.1:{port}", HOSTS[0])
    yield made
    made.close(0)


@pytest.fixture
def peers(port: int) -> Iterator[Peers]:
    made = Peers(port)
    yield made
    made.context.destroy(0)


@pytest.fixture
def other(hub: Hub, peers: Peers) -> zmq.Socket[bytes]:
    """Rank 1, which is in its place; the instance serves."""
    link = peers.come(b"1/ab", encode(Hello(HOSTS[1])))
    assert hub.receive(PATIENCE_S) == (1, Hello(HOSTS[1]))
    hub.met()
    return link


def test_strangers_may_say_anything_and_leave(hub: Hub, peers: Peers, other: zmq.Socket[bytes]) -> None:
    rubbish(peers.port)
    names = [b"?", b"1", b"1/cd", b"7", b"7/ab", b"12345678901234567890123"]
    for link in [peers.come(name, b"rubbish", encode(Failed("ValueError", "no"))) for name in names]:
        assert hub.receive(0.05) is None
        link.close()
    assert hub.receive(1) is None
    other.send(encode(Loading(1, 2)))
    assert hub.receive(PATIENCE_S) == (1, Loading(1, 2))


@pytest.mark.parametrize("rank", MISFITS)
def test_a_host_that_comes_too_late_is_told_why_and_may_leave(
    hub: Hub, peers: Peers, other: zmq.Socket[bytes], rank: int
) -> None:
    late = peers.come(b"%d/cd" % rank, encode(Hello(MISFITS[rank])))
    assert hub.receive(0.2) is None
    end = heard(late)
    assert isinstance(end, End)
    assert end.why
    late.send(encode(Failed("ConfigError", "refused")))
    assert hub.receive(0.1) is None
    late.close()
    assert hub.receive(0.7) is None


def test_a_rank_that_leaves_without_a_word_is_noticed_among_strangers(
    hub: Hub, peers: Peers, other: zmq.Socket[bytes]
) -> None:
    peers.come(b"?").close()
    assert hub.receive(0.2) is None
    began = time.monotonic()
    other.close()
    with pytest.raises(PeerError, match=r"^ranks \[1\] on other hosts have gone, or cannot be reached$"):
        hub.receive(PATIENCE_S)
    assert time.monotonic() - began < NOTICED_S


def test_a_rank_that_says_what_cannot_be_read_is_named(hub: Hub, other: zmq.Socket[bytes]) -> None:
    other.send(b"rubbish")
    with pytest.raises(PeerError, match="rank 1 said what cannot be read"):
        hub.receive(PATIENCE_S)


def test_while_the_ranks_meet_a_host_that_does_not_fit_ends_the_start(hub: Hub, peers: Peers) -> None:
    first = peers.come(b"1/ab", encode(Hello(HOSTS[1])))
    assert hub.receive(PATIENCE_S) is not None
    second = peers.come(b"1/cd", encode(Hello(IN_USE)))
    with pytest.raises(ConfigError, match="two hosts have it: host 1 and late"):
        hub.receive(PATIENCE_S)
    hub.close(0)
    for link in (first, second):
        end = heard(link)
        assert isinstance(end, End)
        assert end.why
