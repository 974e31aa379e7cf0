"""Promise: which kernels run, and which steps run as CUDA graphs, is asked for or told, and every row fits a size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.test_config import CUDA, HYBRID, config_of, resolved, spec_of


def graphs(**asked: object) -> tuple[tuple[int, ...], ...]:
    return config_of(spec_of(HYBRID), CUDA, **asked).kernels.graphs


@pytest.mark.parametrize("rows", [1, 7, 8, 63, 64, 65, 256, 500, 512])
def test_a_step_of_all_rows_fits_a_size(rows: int) -> None:
    decode, segments, _ = graphs(max_running_requests=rows)
    assert decode[-1] == rows
    assert segments[-1] >= rows + 1, "one range of the largest size is padding"


ALL_TO_ALL = {"moe_a2a_backend": "all_to_all", "tp_size": 2, "ep_size": 2}


@pytest.mark.parametrize("off", [{"disable_cuda_graph": True}, {"attention_backend": "torch"}, ALL_TO_ALL], ids=str)
def test_graphs_that_are_off_are_told_and_so_is_each_flag_that_sizes_them(off: dict[str, object]) -> None:
    found = resolved(spec_of(HYBRID), replace(CUDA, count=2), cuda_graph_max_bs=8, **off)
    told = {decision.what: decision.value for decision in found.decisions}
    assert found.config.kernels.graphs == ((), (), ())
    assert told["CUDA graphs"] == "off"
    assert told["--cuda-graph-max-bs"] == "ignored"


def test_sizes_are_those_asked_for() -> None:
    assert graphs(cuda_graph_bs=(4, 1, 4))[0] == (1, 4)
    assert graphs(cuda_graph_max_bs=3)[0] == (1, 2, 3)


def test_float64_gets_kernels_that_compute_in_it() -> None:
    assert config_of(spec_of(HYBRID), CUDA, dtype="float64").kernels.attention == "torch"
    assert config_of(spec_of(HYBRID), CUDA).kernels.attention == "triton"
