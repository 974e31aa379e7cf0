"""On a CUDA device: the CPU's tokens, and launching waits for nothing. Runs with `tools/gpu_check.sh`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import tessera
from run.test_loop import Engine
from tessera.core.messages import Fatal, Outbound, SamplingParams, Stop, Submit
from tessera.core.tensors import cache_dtypes, cache_table
from tessera.plan.step import Change, Step
from tessera.run.core import EngineCore
from tessera.run.pools import Pools
from test_engine import FLAGS as ENGINE_FLAGS
from test_engine import GREEDY as SHORT
from test_engine import fill
from test_invariance import LAYOUTS, alone, model, prompts, requests
from tiny import PATIENCE_S, TINY, resolved, serve

pytestmark = pytest.mark.gpu
CHOSEN = ("all at once", "overlapped", "chunk 3", "mixed", "tiny pool", "tiny pool, mixed, cached", "page 1")
SLEEP_CYCLES = 400_000_000  # of the device's clock: about a fifth of a second


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", CHOSEN)
@pytest.mark.parametrize("kind", ["greedy", "varied"])
@pytest.mark.parametrize("name", TINY)
def test_float64_gives_the_tokens_of_the_cpu(name: str, kind: str, layout: str) -> None:
    run = serve(model(name), requests(kind), dtype="float64", device="cuda", **LAYOUTS[layout])
    assert run.ends() == alone(name, kind).ends()
    assert run.most_in_flight == (1 if layout == "all at once" else 2)


@pytest.mark.parametrize("name", TINY)
def test_float32_gives_the_greedy_tokens_of_the_cpu(name: str) -> None:
    run = serve(model(name), requests("greedy"), dtype="float32", device="cuda")
    assert run.ends() == alone(name, "greedy", "float32").ends()


@pytest.mark.parametrize("name", TINY)
def test_teacher_forced_logprobs_agree_with_the_cpu(name: str) -> None:
    plain, here = (scored(name, device, "float32") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(here, plain, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_errs_as_little_as_on_the_cpu(name: str) -> None:
    exact, cpu, cuda = scored(name, "cpu", "float32"), scored(name, "cpu", "bfloat16"), scored(name, "cuda", "bfloat16")
    assert abs(cuda - exact).mean() < 3 * abs(cpu - exact).mean() + 0.01


@cache
def scored(name: str, device: str, dtype: str) -> np.ndarray:
    """The logprob of every prompt token but the first of each prompt."""
    score = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    asked = [Submit(f"r{i}", [*prompt, 5, 6], score) for i, prompt in enumerate(prompts())]
    run = serve(model(name), asked, device=device, dtype=dtype)
    found = [entry.logprob for key in sorted(run.answers) for entry in run.answers[key].prompt_logprobs or []]
    return np.array([logprob for logprob in found if logprob is not None])


def test_launching_waits_for_nothing() -> None:
    """Decode steps with everything that a row may ask for are launched while the device still sleeps."""
    tiny, seconds = model("qwen3"), []
    asked = [msgspec.structs.replace(r, tokens=r.tokens[:20] or [2]) for r in requests("varied")]
    long = {"max_new_tokens": 40, "ignore_eos": True, "stop_token_ids": (), "logprobs": 2}
    said: list[Outbound] = []
    core = EngineCore(resolved(tiny.spec, device="cuda"), tiny.spec, tiny.source, said.append)
    launch = core.runner.launch

    def watched(step: Step) -> Any:
        decode = bool((step.parts[0].lengths == 1).all()) and len(seconds) < 20
        if decode:
            torch.cuda._sleep(SLEEP_CYCLES)
            torch.cuda.set_sync_debug_mode("error" if len(seconds) > 3 else "default")
        began = time.perf_counter()
        try:
            return launch(step)
        finally:
            if decode:
                seconds.append(time.perf_counter() - began)
            torch.cuda.set_sync_debug_mode("default")

    core.runner.launch = watched  # type: ignore[method-assign]
    for submit in asked:
        core.post(msgspec.structs.replace(submit, params=msgspec.structs.replace(submit.params, **long)))
    core.post(Stop(PATIENCE_S["cuda"]))
    core.run()
    assert not any(isinstance(message, Fatal) for message in said), said[-1]
    assert len(seconds) == 20
    assert np.median(seconds[4:]) < 0.05, seconds


def test_an_engine_on_the_device_answers_text(tmp_path: Path) -> None:
    folder, flags = fill(tmp_path), {**ENGINE_FLAGS, "dtype": "float32"}
    with tessera.Engine(str(folder), **flags) as engine:
        expected = engine.generate(["12 + 7 =", "3 - 1 ="], SHORT)
    with tessera.Engine(str(folder), **{**flags, "device": "cuda"}) as engine:
        assert engine._local.core.runner.pools.device.type == "cuda"
        found = engine.generate(["12 + 7 =", "3 - 1 ="], SHORT)
        parts = list(engine.generate("12 + 7 =", SHORT, stream=True))
    assert [a["output_ids"] for a in found] == [a["output_ids"] for a in expected]
    assert parts[-1]["text"] == found[0]["text"]


def test_a_failure_on_the_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(device="cuda")
    forward, calls = engine.core.runner.model.forward, iter(range(3))

    def exhausted(*args: Any) -> Any:
        if next(calls) == 2:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(*args)

    monkeypatch.setattr(engine.core.runner.model, "forward", exhausted)
    for i in range(4):
        engine.core.post(Submit(f"r{i}", prompts()[i], SamplingParams(max_new_tokens=50, ignore_eos=True)))
    with engine:
        assert {output.finish for output in engine.ended().values()} == {"error"}
        assert (engine.fatal() or Fatal("")).kind == "OutOfMemoryError"


def test_a_change_waits_for_nothing() -> None:
    """Copies and zeroed slots: a number that came from the host by itself was waited for, once a pool."""
    spec = model("hybrid").spec
    specs = cache_table(spec, 4, cache_dtypes(spec, "float32"))
    pools = Pools(specs, 8, 8, "cuda")
    slotted = [spec.name for spec in specs if spec.kind == "slot"]
    for tensor in pools.tensors.values():
        tensor.view(torch.uint8).fill_(1)
    pairs = np.array([[1, 2]], np.int32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pools.apply(Change(page_copies=pairs, slot_copies=pairs + 3, zero_slots=np.array([1, 7], np.int32)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert slotted
    for name in slotted:
        assert [bool(row.any()) for row in pools.tensors[name]] == [True, False, True, True, True, True, True, False]
