"""NIXL between processes keeps the protocol: over whatever UCX picks on one host, and over TCP as between hosts."""

from __future__ import annotations

from functools import partial

import pytest

from tessera.core.errors import ConfigError
from tessera.transfer.engines import make_engine
from tessera.transfer.nixl import REMEDY
from tessera.transfer.optional import library
from transfer.conformance import Apart

try:
    library("nixl", ("nixl", "nixl_cu12"), REMEDY)
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.engines
class TestOnOneHost(Apart):
    make = partial(make_engine, "nixl")


class TestOverTcp(Apart):
    make = partial(make_engine, "nixl")
    environ = {"UCX_TLS": "tcp"}  # noqa: RUF012 (a ClassVar of the base)
