"""The engine between processes of one host keeps the protocol."""

from __future__ import annotations

from functools import partial

import pytest

from tessera.transfer.engines import make_engine
from tessera.transfer.host import HostMover
from transfer.conformance import Apart, Conformance, Pair
from transfer.movers import Make, making

engines = pytest.fixture(making)


class TestBetweenProcesses(Apart):
    make = partial(make_engine, "local")


class TestInOneProcess(Conformance):
    @pytest.fixture
    def pair(self, engines: Make) -> Pair:
        return lambda: (engines(HostMover()), engines(HostMover()))
