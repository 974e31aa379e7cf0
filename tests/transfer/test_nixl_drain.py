"""What NIXL has under way ends before its reader is torn down; a writer that hangs does not hold that up."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from torch import Tensor

from tessera.transfer import nixl
from tessera.transfer.nixl import Exported, NixlSource


class FakeAgent:
    """An agent whose one read ends at its `ends`-th look, of which the second sets `stop`."""

    def __init__(self, ends: float, stop: threading.Event) -> None:
        self.ends, self.stop, self.looks = ends, stop, 0

    def add_remote_agent(self, metadata: bytes) -> str:
        return "writer"

    def transfer(self, handle: object) -> str:
        return "PROC"

    def check_xfer_state(self, handle: object) -> str:
        self.looks += 1
        if self.looks == 2:
            self.stop.set()
        return "DONE" if self.looks >= self.ends else "PROC"


def source(agent: Any) -> NixlSource:
    """A reader without memory of its own, in the middle of a read."""
    own: dict[int, Tensor] = {}
    return NixlSource(Exported(b"", None, {}), agent, own)


def test_a_read_under_way_comes_to_its_end_after_a_stop() -> None:
    """Known fault: the reader was torn down at once, and over TCP a writer that was still answering aborted."""
    stop = threading.Event()
    agent = FakeAgent(20, stop)
    assert source(agent)._wait(stop) == "DONE"
    assert stop.is_set()


def test_a_read_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_DRAIN_S", 0.1)
    stop, began = threading.Event(), time.monotonic()
    assert source(FakeAgent(float("inf"), stop))._wait(stop) == "PROC"
    assert time.monotonic() - began >= 0.1
