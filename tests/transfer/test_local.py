"""The engine inside one process keeps the protocol; one that ignores the fence does not."""

from __future__ import annotations

import pytest

from tessera.transfer.local import LocalEngine, LocalNet
from transfer.conformance import Conformance, Pair


def make_pair() -> tuple[LocalEngine, LocalEngine]:
    net = LocalNet()
    return LocalEngine(net), LocalEngine(net)


class TestLocal(Conformance):
    @pytest.fixture
    def pair(self) -> Pair:
        return make_pair


def test_an_engine_without_a_fence_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "fence", lambda self, writer: None)
    with pytest.raises(AssertionError, match="after the fence"):
        Conformance().test_a_fenced_writer_writes_nothing_more(make_pair)
