"""Promise: a rank whose device has failed in a collective says who did not come, and not what the device says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from run.injected import inject
from run.test_loop import LONG, prompt
from run.test_processes import Multi
from tessera.core.errors import PeerError
from tessera.core.messages import Submit
from tessera.run.rank import Link
from waits import NOTICED_S

FAILING = """
if rank == 0:
    from tessera.comm.dist import told_late
    from tessera.comm import connect as module
    from tessera.run.runner import Runner
    connect = module.connect

    def connected(place):
        comm = connect(place)
        comm.fault = lambda: told_late(comm.mesh, 0, {"tp": [1]} if failed else {}, place.deadline_s)
        return comm

    def collect(self, launched):
        failed.append(1)
        raise RuntimeError("CUDA error: unspecified launch failure")

    failed = []
    module.connect, Runner.collect = connected, collect
"""


def test_who_did_not_come_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(FAILING, tmp_path, monkeypatch)
    engine = Multi(watchdog_timeout=20)
    engine.core.post(Submit("r", prompt(1), LONG))
    with engine:
        last = engine.ended()
    fatal, said = engine.fatal(), "through the peers' memory: nothing came from rank 1 for 20 s"
    assert fatal is not None
    assert f"rank 0: DeadlineError: rank 0 in a collective of ranks 0, 1 {said}" in fatal.error
    assert said in (last["r", 0].error or "")


def test_a_rank_of_another_host_notices_the_end_of_its_engine_while_it_loads() -> None:
    """Known fault: only once it had loaded everything."""
    with zmq.Context() as context:
        engine = context.socket(zmq.ROUTER)
        port = engine.bind_to_random_port("tcp://127.0.0.1")
        link = Link(f"tcp://127.0.0.1:{port}", 1, elsewhere=True)
        try:
            link.loaded(0, 1 << 20)
            assert engine.recv_multipart()
            engine.close(0)
            began = time.monotonic()
            assert link.gone.poll(1e3 * NOTICED_S)
            with pytest.raises(PeerError, match="the engine has gone"):
                link.loaded(1, 1 << 20)
            assert time.monotonic() - began < NOTICED_S
        finally:
            link.close()
