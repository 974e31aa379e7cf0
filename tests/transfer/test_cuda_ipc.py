"""Copies between GPUs of one host keep the protocol: on one GPU between two processes, and from one GPU to another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from tessera.core.errors import ConfigError
from tessera.transfer.engines import make_engine
from transfer.conformance import DEADLINE_S, Apart, finish
from transfer.sides import Side

NUM_GPUS = torch.cuda.device_count()


@pytest.mark.gpu
class TestOnOneGpu(Apart):
    make = partial(make_engine, "cuda_ipc")
    devices = ("cuda:0", "cuda:0")
    repeats = 64


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
class TestBetweenGpus(Apart):
    make = partial(make_engine, "cuda_ipc")
    devices = ("cuda:0", "cuda:1")
    repeats = 64

    def test_short_and_long_runs_of_many_regions(self, sides: Callable[[], Side]) -> None:
        """As pages of 64 tokens with half of the heads, and slots of several megabytes."""
        writer, reader = sides(), sides()
        source = [torch.randint(0, 256, (1 << 24,), dtype=torch.uint8, device=self.devices[0]) for _ in range(3)]
        target = [torch.zeros(1 << 24, dtype=torch.uint8, device=self.devices[1]) for _ in range(3)]
        for i in range(3):
            writer.register(i, source[i])
            reader.register(i, target[i])
        peer = writer.connect(reader.endpoint(), DEADLINE_S)
        at = np.arange(0, 1 << 24, 1 << 15)
        short = [np.stack([0 * at + i, at, 0 * at + i, at[::-1] + (1 << 14), 0 * at + (1 << 14)], 1) for i in (0, 1)]
        long = np.array([[2, 0, 2, 1 << 22, 3 << 22]])
        ticket = writer.write(peer, np.concatenate([*short, long]))
        assert finish(writer, {ticket})[ticket].error is None
        for i in (0, 1):
            wanted = torch.zeros(1 << 24, dtype=torch.uint8).view(-1, 2, 1 << 14)
            wanted[:, 1] = source[i].cpu().view(-1, 2, 1 << 14)[:, 0].flip(0)
            assert torch.equal(target[i].cpu(), wanted.view(-1))
        assert torch.equal(target[2][1 << 22 :].cpu(), source[2][: 3 << 22].cpu())
        assert not target[2][: 1 << 22].any()


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
def test_a_process_need_not_see_the_gpu_of_the_other() -> None:
    """As servers that were given a GPU each: there and back again."""
    size = 1 << 20
    engine, side = make_engine("cuda_ipc"), Side(partial(make_engine, "cuda_ipc"), {"CUDA_VISIBLE_DEVICES": "1"})
    try:
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
        target = torch.zeros(size, dtype=torch.uint8, device="cuda:0")
        engine.register(0, source)
        engine.register(1, target)
        side._call("register", 7, "cuda:0", np.zeros(size, np.uint8))
        torch.cuda.synchronize()
        there = engine.write(engine.connect(side.endpoint(), DEADLINE_S), np.array([[0, 0, 7, 0, size]]))
        assert finish(engine, {there})[there].error is None
        back = side.write(side.connect(engine.endpoint(), DEADLINE_S), np.array([[7, 0, 1, 0, size]]))
        assert finish(side, {back})[back].error is None
        assert torch.equal(source, target)
    finally:
        engine.close()
        side.end()


def test_memory_of_the_host_is_refused_by_name() -> None:
    writer, reader = make_engine("cuda_ipc"), make_engine("cuda_ipc")
    writer.register(0, torch.zeros(8))
    with pytest.raises(ConfigError, match="region 0 is in memory of the host"):
        writer.connect(reader.endpoint(), DEADLINE_S)
    writer.close()
    reader.close()
