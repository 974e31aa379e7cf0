"""A courier meets whoever is there, tells the truth about whoever is not, and outlives whoever babbles."""

from __future__ import annotations

import queue
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from run.toy import toy_caches
from tessera.core.config.types import HandoverConfig
from tessera.core.errors import ConfigError
from tessera.core.mesh import SINGLE
from tessera.core.messages import Address
from tessera.core.tensors import CacheSpec
from tessera.plan.handoff import Closed, Fence, Gone, Heard, Joined, Meet, Met, Over, Tell, Unmet, Why
from tessera.run.bootstrap import Bootstrap
from tessera.run.courier import Courier
from tessera.run.poster import Connect, Connected, Part, Shut
from tessera.transfer.manifest import Manifest, Member, Region, new_instance
from waits import PATIENCE_S

WAIT_S = PATIENCE_S


def manifest(page_size: int = 4) -> Manifest:
    caches: tuple[CacheSpec, ...] = toy_caches(page_size)
    counts = {"page": 5, "slot": 3}
    regions = tuple(Region(i, counts[c.kind] * c.bytes_per_unit(SINGLE)) for i, c in enumerate(caches))
    members = (Member("local", b"here", counts["page"], counts["slot"], regions),)
    return Manifest(
        instance=new_instance(),
        weights="w",
        parts="float32",
        mesh=SINGLE,
        page_size=page_size,
        caches=caches,
        members=members,
    )


class Side:
    """A courier and what it tells. Its one rank reaches every peer, or says `unreachable`."""

    def __init__(
        self, role: str, page_size: int = 4, unreachable: str | None = None, port: int = 0, **times: float
    ) -> None:
        self.told: queue.Queue[Any] = queue.Queue()
        self._unreachable = unreachable
        config = HandoverConfig(
            role=role, bootstrap_port=port, **{"heartbeat_interval": 0.1, "silence": WAIT_S, **times}
        )
        self.courier = Courier(config, "127.0.0.1", manifest(page_size), (f"{role}-0",), self._tell)

    def _tell(self, event: Any) -> None:
        if isinstance(event, Connect):
            self.courier.news(Connected(event.peer, 0, self._unreachable))
        self.told.put(event)

    def wait(self, kind: type) -> Any:
        """The next event of a kind; others before it are dropped."""
        until = time.monotonic() + WAIT_S
        while not isinstance(found := self.told.get(timeout=until - time.monotonic()), kind):
            pass
        return found

    @property
    def address(self) -> Address:
        assert self.courier.bootstrap is not None
        return self.courier.bootstrap


@pytest.fixture
def make() -> Iterator[Callable[..., Side]]:
    made: list[Side] = []

    def side(*args: Any, **fields: Any) -> Side:
        made.append(Side(*args, **fields))
        return made[-1]

    yield side
    for one in made:
        one.courier.close()


def met(prefill: Side, decode: Side) -> str:
    decode.courier.do(Meet(prefill.address))
    found = decode.wait(Met)
    assert found.address == prefill.address
    assert prefill.wait(Joined).peer == found.peer
    return str(found.peer)


def test_letters_go_both_ways_and_a_session_ends_at_both_ends(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", silence=3.0), make("decode", silence=3.0)
    peer = met(prefill, decode)
    decode.courier.do(Tell(peer, Over(3, 7)))
    assert prefill.wait(Heard).letter == Over(3, 7)
    prefill.courier.do(Tell(peer, Closed(3, Why("no"))))
    assert decode.wait(Heard).letter == Closed(3, Why("no"))
    time.sleep(3.5)  # longer than the silence that is allowed: there are signs of life
    decode.courier.do(Fence(peer))
    assert decode.wait(Shut) == Shut(peer, ("prefill-0",))
    assert prefill.wait(Gone).peer == peer
    assert prefill.wait(Part).peer == peer
    assert met(prefill, decode) != peer


def test_a_server_that_ends_is_noticed_and_its_successor_is_another_peer(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill"), make("decode")
    peer = met(prefill, decode)
    prefill.courier.close()
    assert decode.wait(Gone).peer == peer
    decode.courier.do(Meet(prefill.address))
    assert str(prefill.address) in decode.wait(Unmet).why.text
    successor = make("prefill", port=prefill.address.port)
    assert met(successor, decode) != peer


MISFITS = {
    "pages": ({"page_size": 8}, ("toy.tokens", "prefill has pages of 8 tokens, decode of 4")),
    "reach": ({"unreachable": "another host"}, ("rank 0 cannot reach its ranks: another host",)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_pair_that_does_not_fit_or_reach_is_refused_with_the_reason_and_both_are_told(
    make: Callable[..., Side], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    flags, words = MISFITS[name]
    prefill, decode = make("prefill", **flags), make("decode")
    decode.courier.do(Meet(prefill.address))
    unmet = decode.wait(Unmet)
    assert all(word in unmet.why.text for word in words)
    logged = [record.getMessage() for record in caplog.records]
    assert all(sum(word in line for line in logged) >= 2 for word in words), "the logs of both servers tell it"
    assert prefill.wait(Joined).peer == unmet.peer
    for errand in (Tell(unmet.peer, Over(3, 7, unmet.why)), Fence(unmet.peer)):  # what the taker does then
        decode.courier.do(errand)
    assert prefill.wait(Heard).letter == Over(3, 7, unmet.why)
    assert prefill.wait(Gone).peer == unmet.peer
    assert decode.wait(Shut) == Shut(unmet.peer, ())


def test_what_was_said_before_a_line_is_left_arrives(make: Callable[..., Side]) -> None:
    """More than the line takes at once."""
    prefill, decode = make("prefill", page_size=8), make("decode")
    decode.courier.do(Meet(prefill.address))
    peer = decode.wait(Unmet).peer
    for i in range(200):
        decode.courier.do(Tell(peer, Over(i, i, Why("x" * 100_000))))
    decode.courier.do(Fence(peer))
    assert [prefill.wait(Heard).letter.room for _ in range(200)] == list(range(200))
    assert prefill.wait(Gone).peer == peer


def test_a_server_of_another_release_is_refused_and_told(
    make: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = make("prefill")
    decode = make("decode")
    monkeypatch.setattr("tessera.transfer.manifest.PROTOCOL", 99)  # what both will compare with: decode's is of before
    decode.courier.do(Meet(prefill.address))
    unmet = decode.wait(Unmet)
    assert "run one release on both sides" in unmet.why.text
    assert prefill.wait(Joined).peer == unmet.peer


def test_somebody_else_at_the_address(make: Callable[..., Side]) -> None:
    decode = make("decode", decode_bootstrap_timeout=1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it accepts, and says nothing
        decode.courier.do(Meet(Address("127.0.0.1", mute.getsockname()[1])))
        assert "has not answered in 1 s" in decode.wait(Unmet).why.text


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1", b"\xff" * 64])
def test_who_babbles_is_hung_up_on_and_others_are_served(make: Callable[..., Side], junk: bytes) -> None:
    prefill, decode = make("prefill"), make("decode")
    answer = httpx.get(f"http://{prefill.address}/bootstrap", trust_env=False)
    port = msgspec.msgpack.decode(answer.content, type=Bootstrap).port
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(junk)
        line.shutdown(socket.SHUT_WR)
        line.settimeout(WAIT_S)
        while line.recv(4096):
            pass
    met(prefill, decode)


def test_a_silent_peer_is_given_up(make: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = make("prefill", silence=0.5), make("decode")
    monkeypatch.setattr("tessera.run.courier.LEAST_BEAT_S", 60.0)
    peer = met(prefill, decode)
    gone = prefill.wait(Gone)
    assert (gone.peer, gone.reason) == (peer, "it has been silent for 0.5 s")


@pytest.mark.parametrize("quick", ["prefill", "decode"])
def test_each_side_hears_the_other_as_often_as_it_asked(make: Callable[..., Side], quick: str) -> None:
    """The two may have been started with other intervals; the quick one must not give up the slow one."""
    times = {"heartbeat_interval": 0.5, "silence": 3.0}
    slow = {"heartbeat_interval": 60.0, "silence": 120.0}
    sides = {role: make(role, **(times if role == quick else slow)) for role in ("prefill", "decode")}
    met(sides["prefill"], sides["decode"])
    with pytest.raises(queue.Empty):
        sides[quick].told.get(timeout=4.0)


def test_a_port_that_is_taken_is_refused_by_flag(make: Callable[..., Side]) -> None:
    prefill = make("prefill")
    with pytest.raises(ConfigError, match="--disaggregation-bootstrap-port"):
        Side("prefill", port=prefill.address.port)
