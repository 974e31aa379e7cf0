"""Promise: what a rank has written is told once, whatever it was made of, and as soon as it has landed."""

from __future__ import annotations

import queue
import select
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tessera.core.mesh import SINGLE
from tessera.plan.step import Send, ints
from tessera.run import poster
from tessera.run.mailbox import Mailbox, readable
from tessera.run.poster import Connect, Connected, News, Poster, Written
from tessera.transfer.base import Done
from tessera.transfer.manifest import Member

WAIT_S = 60.0
MEMBER = Member("local", b"writer", 4, 4, ())


class Engine:
    """Every batch has landed when it is asked for."""

    name = "writer"

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        return endpoint.decode()

    def write(self, peer: str, runs: np.ndarray) -> int:
        self.batches.append(runs)
        return len(self.batches) - 1

    def poll(self) -> list[Done]:
        over, self.over = range(getattr(self, "over", 0), len(self.batches)), len(self.batches)
        return [Done(ticket) for ticket in over]

    def wait(self, also: int, seconds: float | None) -> None:
        select.select([also], [], [], seconds)

    def close(self) -> None:
        """Nothing is held."""


class Plan:
    """Pages and the slot of rank 0 go to the same rank."""

    def __init__(self, *_: object) -> None:
        """The same for all servers."""

    def readers(self, rank: int) -> list[int]:
        return [0]

    def pairs(self, src_dp: int, dst_dp: int) -> list[tuple[int, int]]:
        return [(0, 0)]

    def paged(self, *_: object) -> np.ndarray:
        return np.array([[0, 0, 0, 0, 8]], np.int64)

    def slots(self, *_: object) -> np.ndarray:
        return np.array([[1, 0, 1, 0, 4]], np.int64)


class Slow(Engine):
    """Batches land when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.landed: Mailbox[int] = Mailbox()
        self.asked = 0

    def poll(self) -> list[Done]:
        self.asked += 1
        return [Done(ticket) for ticket in self.landed.take()]

    def wait(self, also: int, seconds: float | None) -> None:
        readable([also, self.landed.there], seconds)


def test_nobody_asks_while_a_batch_is_under_way_and_its_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poster, "CopyPlan", Plan)
    said: queue.SimpleQueue[News] = queue.SimpleQueue()
    slow = Slow()
    engine: Any = slow
    one = Poster(engine, SINGLE, 0, MEMBER, said.put)
    destination: Any = SimpleNamespace(members=[SimpleNamespace(endpoint=b"reader")])
    one.order(Connect("peer", destination, destination))
    assert said.get(timeout=WAIT_S) == Connected("peer", 0, None)
    one.post([Send(1, 5, "peer", 0, ints([1]), ints([2]), 3, 4)])
    while not slow.batches:
        time.sleep(0.001)
    time.sleep(0.2)
    assert slow.asked < 10
    slow.landed.put(0)
    assert said.get(timeout=WAIT_S).ticket == 5  # type: ignore[union-attr]
    one.close()


def test_a_send_of_pages_and_a_slot_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poster, "CopyPlan", Plan)
    said: queue.SimpleQueue[News] = queue.SimpleQueue()
    engine: Any = Engine()
    one = Poster(engine, SINGLE, 0, MEMBER, said.put)
    destination: Any = SimpleNamespace(members=[SimpleNamespace(endpoint=b"reader")])
    one.order(Connect("peer", destination, destination))
    assert said.get(timeout=WAIT_S) == Connected("peer", 0, None)
    one.post([Send(1, ticket, "peer", 0, ints([1]), ints([2]), 3, 4) for ticket in (5, 6)])
    found = [said.get(timeout=WAIT_S) for _ in range(2)]
    one.close()
    assert said.empty(), "told twice"
    assert [(w.ticket, w.num_bytes, w.error) for w in found if isinstance(w, Written)] == [(5, 12, None), (6, 12, None)]
    assert len(engine.batches) == 1, "all sends of a step to one rank are one batch"
