"""The engine between processes of one host keeps the protocol."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tessera.transfer.base import Engine
from tessera.transfer.engines import make_engine
from transfer.conformance import Apart, Conformance, Pair

make = partial(make_engine, "local")


class TestBetweenProcesses(Apart):
    make = make


class TestInOneProcess(Conformance):
    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        made: list[Engine] = []

        def pair() -> tuple[Engine, Engine]:
            made.extend((make(), make()))
            return made[-2], made[-1]

        yield pair
        for engine in made:
            engine.close()
