"""On a CUDA device: fp8 weights by our kernels, in graphs and not, and fp8 pages, against the plain twins on the CPU.

An activation on the border of two of fp8's numbers goes either way, so tokens may differ where two are as likely. What
the device computes is nearer to the twin than fp8 is to the model as it was.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
import pytest

from run.test_cuda_graphs import WIDE, _at_once, model, shaped
from tessera.core.messages import SamplingParams, Submit
from tessera.core.quantization import Quantization
from tessera.models.quantizing import Quantizing
from test_invariance import LAYOUTS, PLAIN, prompts
from tiny import TinyModel, serve

__all__ = ["_at_once"]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # on the CPU, on the device
    "weights": ({"quantization": "fp8", "fp8_gemm_backend": "torch"}, {"quantization": "fp8"}),
    "e4m3 pages": ({"kv_cache_dtype": "fp8_e4m3"},) * 2,
    "e5m2 pages": ({"kv_cache_dtype": "fp8_e5m2"},) * 2,
}


@cache
def quantised(name: str) -> TinyModel:
    plain = model(name)
    return TinyModel(plain.spec, Quantizing(plain.source, Quantization(loading=True)))


def drawn(name: str, **flags: Any) -> np.ndarray:
    """The likeliest logprobs of the token after each prefix of the prompts."""
    params = SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
    asked = [
        Submit(f"{i}-{n}", prompt[:n], params) for i, prompt in enumerate(prompts()) for n in range(1, len(prompt), 5)
    ]
    run = serve(quantised(name) if "quantization" in flags else model(name), asked, dtype="float32", **flags)
    return np.array([run.answers[key].logprobs[0].top_logprobs[0] for key in sorted(run.answers)])


@cache
def on_the_cpu(name: str, variant: str) -> np.ndarray:
    return drawn(name, device="cpu", **PLAIN, **(VARIANTS[variant][0] if variant else {}))


@pytest.mark.parametrize("name", WIDE)
def test_fp8_is_seen_and_small(name: str) -> None:
    for variant in VARIANTS:
        apart = abs(on_the_cpu(name, variant) - on_the_cpu(name, ""))
        assert 1e-4 < apart.mean() < 0.5, variant


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("layout", ["overlapped", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", WIDE)
def test_the_device_computes_what_the_twins_do(name: str, variant: str, layout: str, graphs: bool) -> None:
    flags = {"device": "cuda", "disable_cuda_graph": not graphs, **LAYOUTS[layout], **VARIANTS[variant][1]}
    twin = on_the_cpu(name, variant)
    assert abs(drawn(name, **flags) - twin).mean() < 0.7 * abs(twin - on_the_cpu(name, "")).mean()


# Widths in whole blocks, and more than 64 rows an expert in a step of two prompts.
WHOLE = {**WIDE["mla"], "hidden_size": 512, "moe_intermediate_size": 128}
LONG = [np.random.default_rng(n).integers(2, 96, 230).tolist() for n in range(6)]


def after_long(**flags: Any) -> np.ndarray:
    """The likeliest logprobs of the tokens after long prompts."""
    params = SamplingParams(max_new_tokens=4, temperature=0.0, logprobs=1, ignore_eos=True)
    asked = [Submit(str(i), prompt, params) for i, prompt in enumerate(LONG)]
    tiny = shaped("mla", WHOLE)
    if "quantization" in flags:
        tiny = TinyModel(tiny.spec, Quantizing(tiny.source, Quantization(loading=True)))
    run = serve(tiny, asked, dtype="bfloat16", device="cuda", chunked_prefill_size=480, **flags)
    return np.array([run.answers[str(i), 0].logprobs[0].top_logprobs[0] for i in range(len(LONG))])


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="deep_gemm is not installed")
@pytest.mark.timeout(600)  # kernels are compiled when they are met first
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_deep_gemm_computes_what_our_kernels_do(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tessera.ops import deep_gemm_fp8

    made: list[str] = []
    for name in ("product", "padded_rows"):
        version = getattr(deep_gemm_fp8, name)
        monkeypatch.setattr(deep_gemm_fp8, name, lambda *a, _of=version, _name=name: (made.append(_name), _of(*a))[1])
    flags = {"quantization": "fp8", "disable_cuda_graph": not graphs, **PLAIN}
    ours = after_long(**flags)
    assert not made
    theirs = after_long(fp8_gemm_backend="deep_gemm", **flags)
    assert {"product", "padded_rows"} == set(made)
    assert abs(theirs - ours).mean() < 0.7 * abs(ours - after_long(**PLAIN)).mean()
