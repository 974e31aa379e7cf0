"""What a start took is told stage by stage; of ranks side by side the slowest counts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from run.test_loop import Engine
from tessera.run.stages import Stages


def test_the_slowest_rank_counts() -> None:
    stages = Stages({"config": 1.0, "processes": 2.0})
    stages.follow([Stages({"weights": 4.0}, 8 * 10**9), Stages({"weights": 3.0, "pools": 0.5}, 6 * 10**9)])
    assert stages.line() == "config 1.0 s, processes 2.0 s, weights 4.0 s (8.0 GB a rank, 2.0 GB/s), pools 0.5 s"


def test_the_line_of_one_rank_is_in_the_order_of_the_start() -> None:
    stages = Stages({"first token": 0.25, "weights": 2.0, "imports": 3.0}, 3 * 10**9)
    assert stages.line() == "imports 3.0 s, weights 2.0 s (3.0 GB, 1.5 GB/s), first token 0.2 s"


def test_a_stage_that_fails_is_counted_and_one_in_parts_is_added_up() -> None:
    stages = Stages()
    for _ in range(2):
        before = stages.seconds.get("pools", 0.0)
        with pytest.raises(ValueError, match="out of cheese"), stages.timed("pools"):
            raise ValueError("out of cheese")
        assert stages.seconds["pools"] > before


@pytest.mark.parametrize("flags", [{}, {"tp": 2, "collectives": "threads"}], ids=["one rank", "threads"])
def test_an_engine_tells_its_stages(flags: dict[str, Any]) -> None:
    engine = Engine(**flags)
    told = msgspec.convert(engine.core.info()["start"], Stages)
    engine.core.runner.close()
    assert set(told.seconds) == {"kernels", "weights", "pools"}
    assert all(seconds >= 0 for seconds in told.seconds.values())
    assert told.weight_bytes > 0
