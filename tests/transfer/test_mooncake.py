"""Mooncake between processes, over TCP, keeps the protocol."""

from __future__ import annotations

from functools import partial

import pytest

from tessera.core.errors import ConfigError
from tessera.transfer.engines import make_engine
from tessera.transfer.mooncake import REMEDY
from tessera.transfer.optional import library
from transfer.conformance import Apart

try:
    library("mooncake", ("mooncake.engine",), REMEDY)
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.engines
class TestBetweenProcesses(Apart):
    make = partial(make_engine, "mooncake")
