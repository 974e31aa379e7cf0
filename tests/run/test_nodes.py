"""A further host ends with its engine, whatever its ranks do."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tessera.core.errors import PeerError
from tessera.core.families import read_spec
from tessera.run import nodes
from tessera.run.nodes import follow
from tessera.run.startup import Prepared
from tiny import QWEN3, resolved
from waits import NOTICED_S


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of this process again."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_host_whose_rank_hangs_ends_when_its_engine_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """Known fault: it waited for the rank for ever."""
    monkeypatch.setattr(nodes, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(nodes, "END_S", 0.2)
    spec = read_spec(QWEN3)
    with zmq.Context() as context:
        engine = context.socket(zmq.ROUTER)
        port = engine.bind_to_random_port("tcp://127.0.0.1")
        hosts = {"tp": 2, "nnodes": 2, "node_rank": 1, "dist_init_addr": f"127.0.0.1:{port}", "collectives": "gloo"}
        prepared = Prepared(tmp_path, spec, resolved(spec, **hosts))
        leaves = threading.Timer(1.0, engine.close, (0,))
        leaves.start()
        began = time.monotonic()
        with pytest.raises(PeerError, match="the engine has gone, and a rank of this host has not ended"):
            follow(prepared)
        leaves.join()
        assert 1.0 <= time.monotonic() - began < 1.0 + NOTICED_S
