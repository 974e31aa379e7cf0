"""Promise: in bfloat16 a layout changes logprobs by no more than a batch does (`--parts-dtype`: float32; sums,
where ranks hold whole experts).

What is rounded before it is added up makes a sum depend on how it was cut: a rank's part of a projection, what a rank's
share of an expert makes of a token. One rounding that a layout adds is enough: it turns a few numbers to their
neighbours, and all that follow with them. With weights in fp8 such a number may be the next of fp8's, a step of up to
1/8: batches do that too, and a layout does it no more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.comm.local import LocalComm
from tessera.core.messages import SamplingParams, Submit
from tessera.core.quantization import Quantization
from tessera.models.parts import Tools
from tessera.models.quantizing import Quantizing
from tessera.ops.linear import PackedLinear, linear, unrounded
from test_trained import BASE, questions, trained
from tiny import TinyModel, serve

SCORED = SamplingParams(temperature=0.0, max_new_tokens=1, prompt_logprobs=0)
ALONE: dict[str, Any] = {"disable_radix_cache": True, "dtype": "bfloat16", "debug_checks": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2": {"tp": 2},
    "tp 2, ep 2": {"tp": 2, "ep": 2},
    "tp 4, ep 2": {"tp": 4, "ep": 2},
    "dp 2, dense tp 1": {"tp": 2, "dp": 2, "enable_dp_attention": True, "moe_dense_tp_size": 1},
    "dp 2, ep 2, all-to-all": {
        "tp": 2, "dp": 2, "ep": 2, "enable_dp_attention": True, "moe_a2a_backend": "all_to_all",
    },
    "dp 2, ep 2, all-to-all, counted": {
        "tp": 2, "dp": 2, "ep": 2, "enable_dp_attention": True, "moe_a2a_backend": "all_to_all",
        "moe_a2a_padded_tokens": 0,
    },
}  # fmt: skip
FP8 = ", fp8"
CASES = [  # every layout, every kind of layer, each sum of parts at least once
    ("abacus-mla", "tp 2"), ("abacus-mla", "dp 2, dense tp 1"), ("abacus-mla", "dp 2, ep 2, all-to-all"),
    ("abacus-hybrid", "tp 2"), ("abacus-hybrid", "tp 4, ep 2"), ("abacus-hybrid", "dp 2, ep 2, all-to-all, counted"),
    ("abacus-mla" + FP8, "tp 2"), ("abacus-mla" + FP8, "dp 2, ep 2, all-to-all"),
]  # fmt: skip
WHOLE = [  # every rank has whole experts
    ("abacus-mla", "tp 2, ep 2"), ("abacus-hybrid", "tp 2, ep 2"),
    ("abacus-mla", "dp 2, ep 2, all-to-all"), ("abacus-hybrid", "dp 2, ep 2, all-to-all, counted"),
]  # fmt: skip
MORE = 2.0  # times what batches change: those are two samples of a number that varies
FINE = Quantization((48, 8), loading=True)  # blocks that two ranks can cut wherever they cut these models


@cache
def served(name: str) -> TinyModel:
    """A trained model, as it is or with its weights in fp8."""
    plain = trained(name.removesuffix(FP8))
    if not name.endswith(FP8):
        return plain
    return TinyModel(replace(plain.spec, quantization=FINE), Quantizing(plain.source, FINE))


def scored(name: str, parts: str = "float32", **flags: Any) -> Tensor:
    """Logprobs of the tokens of prompts: the same in every layout, and most of them uncertain."""
    asked = [Submit(q.request_id, q.tokens, SCORED) for q in questions(name.removesuffix(FP8))[0]]
    flags = {**BASE, **ALONE, "parts_dtype": parts, "fp8_gemm_backend": "torch", **flags}
    found = serve(served(name), asked, **flags)
    entries = [entry for key in sorted(found.answers) for entry in found.answers[key].prompt_logprobs or []]
    return torch.tensor([entry.logprob for entry in entries if entry.logprob is not None])


@cache
def whole(name: str, parts: str = "float32") -> Tensor:
    return scored(name, parts)


@cache
def batches(name: str, parts: str = "float32") -> float:
    """Mean change of a logprob by another batch, on one rank."""
    return max(apart(whole(name, parts), scored(name, parts, max_running_requests=rows)) for rows in (2, 8))


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().mean())


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_layout_changes_no_more_than_a_batch(name: str, layout: str) -> None:
    found, batch = apart(whole(name), scored(name, **LAYOUTS[layout])), batches(name)
    assert found <= MORE * batch, f"{found:.1e} by the layout, {batch:.1e} by batches"


@pytest.mark.parametrize(("name", "layout"), WHOLE)
def test_a_layout_of_whole_experts_needs_wide_sums_only(name: str, layout: str) -> None:
    found, batch = apart(whole(name, "sums"), scored(name, "sums", **LAYOUTS[layout])), batches(name, "sums")
    assert found <= MORE * batch, f"{found:.1e} by the layout, {batch:.1e} by batches"


@pytest.mark.parametrize("name", ["abacus-mla", "abacus-mla" + FP8])
def test_mutant_parts_in_the_models_dtype(name: str) -> None:
    narrow = [scored(name, "model", **layout) for layout in ({}, {"tp": 2})]
    assert apart(*narrow) > MORE * batches(name)


def test_mutant_parts_that_are_rounded_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    began = LocalComm.sum

    def narrow(self: LocalComm, parts: list[Tensor], axis: str, dtype: torch.dtype | None = None) -> Any:
        return began(self, [part.to(dtype or part.dtype) for part in parts], axis, dtype)

    monkeypatch.setattr(LocalComm, "sum", narrow)
    assert apart(whole("abacus-mla"), scored("abacus-mla", tp=2)) > MORE * batches("abacus-mla")


def test_mutant_one_projection_that_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(self: Tools, x: Tensor, packed: PackedLinear, group: str) -> Tensor:
        y = linear(x, packed)
        return y.to(unrounded(x, packed).dtype) if self.widens(group) else y

    monkeypatch.setattr(Tools, "part", part)
    assert apart(whole("abacus-mla"), scored("abacus-mla", tp=2)) > MORE * batches("abacus-mla")
