"""On a CUDA device: our kernels, replayed as graphs at padded sizes, answer as plain torch on the CPU does.

Models of the sizes that the kernels are made for; `test_cuda.py` has the tiny ones, which run without them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tessera.core.families import read_spec
from tessera.core.messages import SamplingParams, Submit
from tessera.core.weights import weight_table
from tessera.models import experts
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.run import recordings
from tessera.run.graphs import CudaGraphs
from test_invariance import LAYOUTS, PLAIN, prompts, requests
from tiny import TINY, Run, TinyModel, resolved, serve

pytestmark = pytest.mark.gpu

WIDE: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512},
    "hybrid": {
        "hidden_size": 256,
        "head_dim": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "mla": {
        "hidden_size": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
    },
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size is recorded before it runs for the first time, so that every step that has one runs so."""
    monkeypatch.setattr(recordings, "MEETINGS", 0)


GRAPHED = ("all at once", "overlapped", "chunk 3", "mixed", "tiny pool", "tiny pool, mixed, cached")


@cache
def model(name: str) -> TinyModel:
    """A model of `WIDE`."""
    return shaped(name, WIDE[name])


def shaped(name: str, changes: dict[str, Any]) -> TinyModel:
    """A model of `TINY` with other sizes and random weights."""
    spec = read_spec({**TINY[name], **changes})
    shapes = stored_shapes(weight_table(spec, resolved(spec).config.mesh.mesh))
    return TinyModel(spec, Noise(shapes, spec.zero_centred, 1))


@cache
def alone(name: str, kind: str) -> Run:
    """Plain torch on the CPU, one request at a time."""
    return serve(model(name), requests(kind), together=False, dtype="float32", **PLAIN)


def test_the_device_runs_our_kernels_as_graphs() -> None:
    kernels = resolved(model("hybrid").spec, device="cuda").config.kernels
    assert (kernels.attention, kernels.delta, kernels.moe) == ("triton",) * 3
    assert kernels.graphs[0]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("layout", GRAPHED)
@pytest.mark.parametrize("name", WIDE)
def test_greedy_tokens_are_those_of_the_cpu(name: str, layout: str, graphs: bool) -> None:
    flags = {"dtype": "float32", "device": "cuda", "disable_cuda_graph": not graphs, **LAYOUTS[layout]}
    assert serve(model(name), requests("greedy"), **flags).ends() == alone(name, "greedy").ends()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("name", ["hybrid", "mla"])
def test_shared_experts_on_a_second_stream(name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "BESIDE", (1, 4096))
    flags = {"dtype": "float32", "device": "cuda", "disable_cuda_graph": not graphs, **LAYOUTS["mixed"]}
    assert serve(model(name), requests("greedy"), **flags).ends() == alone(name, "greedy").ends()


@pytest.mark.parametrize("kind", ["sampled", "varied"])
@pytest.mark.parametrize("name", WIDE)
def test_sampled_tokens_are_those_of_the_cpu(name: str, kind: str) -> None:
    run = serve(model(name), requests(kind), dtype="float32", device="cuda")
    assert run.ends() == alone(name, kind).ends()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", GRAPHED)
@pytest.mark.parametrize("name", WIDE)
def test_teacher_forced_logprobs(name: str, layout: str, dtype: str) -> None:
    """Prompts are scored without graphs; what is drawn after them, at the end of each prompt, with."""
    expected, found = (
        drawn_logprobs(name, **flags)
        for flags in (
            {"device": "cpu", "dtype": "float32", **PLAIN},
            {"device": "cuda", "dtype": dtype, **LAYOUTS[layout]},
        )
    )
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, atol=5e-4)
    else:  # as little as on the CPU, where the largest difference is 0.2
        assert abs(found - expected).mean() < 0.05


def drawn_logprobs(name: str, **flags: Any) -> np.ndarray:
    """The likeliest logprobs of the token after each prefix of the prompts, by graphs where there are any."""
    params = SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
    asked = [
        Submit(f"{i}-{n}", prompt[:n], params) for i, prompt in enumerate(prompts()) for n in range(1, len(prompt), 5)
    ]
    run = serve(model(name), asked, **flags)
    return np.array([run.answers[key].logprobs[0].top_logprobs[0] for key in sorted(run.answers)])


def test_sizes_share_the_memory_of_their_logits() -> None:
    x = torch.randn(4096, 1000, device="cuda", dtype=torch.bfloat16)
    record = CudaGraphs()
    made = {rows: record(lambda rows=rows: (x[:rows].argmax(-1), (x[:rows] * 2)[:, :999])) for rows in (4096, 64)}
    before = torch.cuda.memory_allocated()
    made |= {rows: record(lambda rows=rows: (x[:rows].argmax(-1), (x[:rows] * 2)[:, :999])) for rows in (2048, 1024)}
    assert torch.cuda.memory_allocated() - before < 1 << 20
    for rows, ((tokens, logits), run) in made.items():
        run()
        assert torch.equal(logits, 2 * x[:rows, :999])
        assert torch.equal(tokens, x[:rows].argmax(-1))
