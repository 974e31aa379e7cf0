"""Promise: what a rank needs besides weights and pools is set aside before pools are sized, or the start is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.test_config import CPU, CUDA, DENSE, HYBRID, decided, spec_of
from tessera.core.config import Hardware, Resolved, resolve
from tessera.core.config.memory import gib
from tessera.core.config.needs import Sketch
from tessera.core.errors import ConfigError
from tessera.core.spec import ModelSpec

SPECS = [spec_of(DENSE), spec_of(HYBRID)]
MIB = 1 << 20


def needing(sizes: dict[str, int]) -> tuple:  # type: ignore[type-arg]
    return tuple((name, lambda sketch, size=size: size) for name, size in sizes.items())


def on_cuda(spec: ModelSpec, memory: int, sizes: dict[str, int], **asked: object) -> Resolved:
    return resolve({"model_path": "m", **asked}, spec, replace(CUDA, memory=memory), needing(sizes))


SIZES = st.dictionaries(st.sampled_from(["a step", "graphs", "peers"]), st.integers(0, 200 * MIB))


@given(st.sampled_from(SPECS), st.integers(4 * MIB, 1 << 30), SIZES, st.none() | st.floats(0.05, 1.0))
def test_all_of_it_fits_into_what_is_free(
    spec: ModelSpec, memory: int, sizes: dict[str, int], fraction: float | None
) -> None:
    asked = {} if fraction is None else {"mem_fraction_static": fraction}
    refusal = ""
    try:
        found = on_cuda(spec, memory, sizes, **asked).config.memory
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert all(f"{name} {gib(size)}" in refusal for name, size in sizes.items() if size), refusal
        return
    assert found.needs == tuple((name, size) for name, size in sizes.items() if size)
    pools = found.weight_bytes + found.kv_bytes + found.state_bytes
    assert pools <= found.budget
    assert pools + sum(sizes.values()) <= memory
    share = 0.85 if fraction is None else fraction
    assert found.budget <= int(share * memory)
    assert fraction is None or found.budget == int(share * memory), "a share that was asked for is honoured"


@given(st.sampled_from(SPECS), SIZES)
def test_on_a_cpu_nothing_is_set_aside(spec: ModelSpec, sizes: dict[str, int]) -> None:
    asked = {"model_path": "m"}
    plain, counted = resolve(asked, spec, CPU), resolve(asked, spec, CPU, needing(sizes))
    assert counted.decisions == plain.decisions
    assert replace(counted.config, memory=replace(counted.config.memory, needs=())) == plain.config


def test_the_default_share_shrinks_and_says_so() -> None:
    result = on_cuda(SPECS[0], 100 * MIB, {"a step": 30 * MIB, "graphs": 10 * MIB})
    assert result.config.memory.budget == 60 * MIB
    assert decided(result, "weights and pools").value == "60.00 MiB"
    assert decided(result, "memory besides weights and pools").why == "a step 30.00 MiB, graphs 10.00 MiB"
    roomy = on_cuda(SPECS[0], 1 << 30, {"a step": 30 * MIB})
    assert roomy.config.memory.budget == int(0.85 * (1 << 30))
    assert not [d for d in roomy.decisions if d.what == "weights and pools"]


def test_a_share_that_leaves_too_little_is_refused_with_the_table_and_one_that_would_do() -> None:
    with pytest.raises(ConfigError) as caught:
        on_cuda(SPECS[0], 100 * MIB, {"a step": 30 * MIB, "graphs": 10 * MIB}, mem_fraction_static=0.9)
    text = str(caught.value)
    assert "--mem-fraction-static 0.9: of 100.00 MiB it leaves 10.00 MiB, and 40.00 MiB are needed" in text
    assert "a step 30.00 MiB, graphs 10.00 MiB" in text
    assert "Use at most --mem-fraction-static 0.6," in text
    on_cuda(SPECS[0], 100 * MIB, {"a step": 30 * MIB, "graphs": 10 * MIB}, mem_fraction_static=0.6)


def test_what_cannot_fit_is_refused_with_the_table() -> None:
    with pytest.raises(ConfigError) as caught:
        on_cuda(SPECS[0], 40 * MIB, {"a step": 30 * MIB, "graphs": 10 * MIB})
    text = str(caught.value)
    assert "no pool of use; besides them: a step 30.00 MiB, graphs 10.00 MiB" in text
    assert "It needs 40." in text
    for flag in ("--chunked-prefill-size", "--max-running-requests", "--context-length"):
        assert flag in text, "each makes a row of the table smaller"


@pytest.mark.parametrize("hardware", [CPU, CUDA])
def test_a_pool_that_was_asked_too_small_is_not_blamed_on_the_memory(hardware: Hardware) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"model_path": "m", "max_total_tokens": 10, "page_size": 16}, SPECS[0], hardware)
    (conflict,) = caught.value.conflicts
    assert conflict.flags == ("--max-total-tokens 10", "--page-size 16")
    assert conflict.remedy == "Use at least --max-total-tokens 32."
    resolve({"model_path": "m", "max_total_tokens": 32, "page_size": 16}, SPECS[0], hardware)


def test_fewer_rows_are_not_advised_where_they_would_not_do() -> None:
    """Known fault: "Use --max-running-requests 1" where what is needed besides leaves nothing for any."""
    with pytest.raises(ConfigError) as caught:
        on_cuda(SPECS[1], 40 * MIB, {"a step": 40 * MIB}, max_running_requests=16)
    assert "It needs 40." in str(caught.value)
    assert "Use --max-running-requests" not in str(caught.value)


def by_tokens(sketch: Sketch) -> int:
    """What a step needs: 10 KiB a token."""
    return sketch.tokens * 10240


@pytest.mark.parametrize(
    ("mib", "sizes"),
    [(400, (8192, 32768)), (300, (8192, 16384)), (150, (8192, 8192)), (70, (4096, 4096)), (40, (2048, 2048))],
)
def test_a_default_chunk_is_cut_before_it_leaves_no_memory(mib: int, sizes: tuple[int, int]) -> None:
    """Known fault: the default was refused, with the advice to give a smaller one."""
    asked, needs = {"model_path": "m", "max_running_requests": 4}, (("a step", by_tokens),)
    result = resolve(asked, SPECS[1], replace(CUDA, memory=mib * MIB), needs)
    scheduling = result.config.scheduling
    assert (scheduling.chunk_size, scheduling.alone_size) == sizes
    assert ("leave no memory" in decided(result, "chunked-prefill-size").why) == (mib < 400)
    with pytest.raises(ConfigError, match="hold weights"):
        resolve({**asked, "chunked_prefill_size": 3 * sizes[1]}, SPECS[1], replace(CUDA, memory=mib * MIB), needs)


def test_no_chunk_is_small_enough_for_too_little_memory() -> None:
    with pytest.raises(ConfigError, match=r"besides them: a step 20\.00 MiB"):
        resolve({"model_path": "m"}, SPECS[1], replace(CUDA, memory=20 * MIB), (("a step", by_tokens),))


def test_a_default_chunk_is_cut_for_a_share_that_was_asked_for() -> None:
    asked, memory = {"model_path": "m", "mem_fraction_static": 0.7}, replace(CUDA, memory=150 * MIB)
    found = resolve(asked, SPECS[1], memory, (("a step", by_tokens),)).config
    assert (found.memory.budget, found.scheduling.alone_size) == (105 * MIB, 4096)


@given(st.integers(1, 4096), st.integers(1, 300), st.sampled_from(["cpu", "cuda"]))
def test_rows_are_counted_for_the_largest_step(chunk: int, rows: int, device: str) -> None:
    seen: list[Sketch] = []

    def note(sketch: Sketch) -> int:
        seen.append(sketch)
        return 0

    asked = {"model_path": "m", "chunked_prefill_size": chunk, "max_running_requests": rows, "context_length": 64}
    config = resolve(asked, SPECS[0], {"cpu": CPU, "cuda": CUDA}[device], (("", note),)).config
    (sketch,) = seen
    assert (sketch.tokens, sketch.rows) == (max(chunk, rows), rows)
    assert sketch.kernels == config.kernels
    assert (sketch.page_size, sketch.context) == (config.memory.page_size, config.model.context_length)


@pytest.mark.parametrize(("most", "context", "tokens"), [(77, 4096, 4096), (8000, 4096, 8000)])
def test_prompts_that_are_not_cut_make_larger_steps(most: int, context: int, tokens: int) -> None:
    found: list[int] = []
    asked = {"chunked_prefill_size": -1, "max_prefill_tokens": most, "context_length": context}
    resolve({"model_path": "m", **asked}, SPECS[0], CPU, (("", lambda sketch: found.append(sketch.tokens) or 0),))
    assert found == [tokens]
