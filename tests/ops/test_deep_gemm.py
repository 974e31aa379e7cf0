"""Products of fp8 weights by DeepGEMM: on CPU what it is given, by a stand-in with its checks; on a GPU itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from ops.cases import CHOICES, expert_ids
from ops.fake_deep_gemm import Calls, make
from ops.test_fp8 import DEVICE, _close, _exact, _experts, _weight
from tessera import ops
from tessera.core.config.types import KernelConfig
from tessera.core.errors import ConfigError
from tessera.core.quantization import deep_gemm_misfit
from tessera.ops import fp8, triton_fp8, triton_fp8_rows, triton_fused
from tessera.ops.backend import backend, chosen
from tessera.ops.fused import Shared, gated_mlp, silu_mul
from tessera.ops.triton_combine import combine
from tessera.ops.triton_sort import sort_rows

CLOSE = 0.01  # of the largest: a step of bfloat16 is up to 2^-7 of it, and sums are off by 1e-3
# Of the norm, of experts. Their first product comes in bfloat16, the twin's in fp32; off by 2^-9, a number near the
# border of two of fp8's goes the other way, a step of 2^-4 to 2^-3. One in 26 does: 1.55 % by the plain twins alone.
FLIPPED = 0.02
MODULES = ("deep_gemm", "deep_gemm_fp8")
HERE = importlib.util.find_spec("deep_gemm") is not None
pytestmark = pytest.mark.usefixtures("poisoned_memory")
library = pytest.mark.skipif(not HERE, reason="deep_gemm is not installed")


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def products(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our module over the stand-in."""
    monkeypatch.setitem(sys.modules, "deep_gemm", make(calls))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, f"tessera.ops.{name}", raising=False)
    yield importlib.import_module("tessera.ops.deep_gemm_fp8")
    for name in MODULES:
        ops.__dict__.pop(name, None)
        sys.modules.pop(f"tessera.ops.{name}", None)


def test_many_rows_are_multiplied_by_the_library(products: Any, calls: Calls) -> None:
    weight, scales = _weight(264, 192, block=(128, 128))
    for num_tokens, made in ((products.ROWS - 1, []), (products.ROWS, ["product"]), (products.ROWS + 5, ["product"])):
        calls.made.clear()
        x = _exact(num_tokens, 200).bfloat16()[:, :192]  # rows with gaps between them
        _close(products.linear(x, weight, scales), fp8.linear_reference(x, weight, scales), CLOSE)
        assert calls.made == made
    weight, scales = _weight(256, 192, block=(128, 128))
    expected = silu_mul(fp8.linear_reference(x, weight, scales))
    _close(products.gated(x, weight, scales, (128, 128)), expected, CLOSE)
    assert calls.made == ["product"] * 2


@pytest.mark.parametrize(("num_tokens", "made"), [(2, []), (20, []), (130, ["product"])])
def test_what_a_gate_gives_is_quantised_as_it_is_made(products: Any, calls: Calls, num_tokens: int, made: list) -> None:
    """To the bit what it would be in two steps; few rows have no such product."""
    w = fp8.Fp8Weight(*_weight(64, 192, block=(128, 128)), (128, 128))
    y = torch.randn(num_tokens, 384, device=DEVICE).bfloat16()
    for version in (products, triton_fp8):
        after = version.after_gate(w)
        assert (num_tokens <= after.above) == (num_tokens == 2)
        apart = version.linear(triton_fused.silu_mul(y), w.values, w.scales, w.block)
        calls.made.clear()
        assert num_tokens <= after.above or torch.equal(after.product(y, False), apart)
        assert calls.made == (made if version is products else [])
        assert num_tokens <= after.above or after.product(y, True).dtype == torch.float32
        assert calls.made == (made if version is products else []), "its results are rounded"


def test_what_is_not_to_be_rounded_is_ours(products: Any, calls: Calls) -> None:
    """As a part of a sum, and as what an expert makes of many rows."""
    w = fp8.Fp8Weight(*_weight(64, 192, block=(128, 128)), (128, 128))
    x = _exact(products.ROWS, 192).bfloat16()
    ours = triton_fp8.linear(x, w.values, w.scales, unrounded=True)
    assert ours.dtype == torch.float32
    assert torch.equal(products.linear(x, w.values, w.scales, unrounded=True), ours)
    num = products.EXPERT_ROWS * 2
    x, ids, weights = _exact(num, 192).bfloat16(), _ids("any", num, 4), torch.rand(num, 2, device=DEVICE)
    found = products.experts(x, *_experts(4, 192, 128, (128, 128)), ids, weights, unrounded=True)
    assert found.dtype == torch.float32
    plain = importlib.import_module("tessera.ops.deep_gemm")
    w13, w2 = torch.randn(2, 64, 64).bfloat16().to(DEVICE), torch.randn(2, 64, 32).bfloat16().to(DEVICE)
    args = (_exact(num, 64).bfloat16(), w13, w2, ids % 2, weights)
    assert plain.experts(*args, unrounded=True).dtype == torch.float32
    assert not calls.made


def test_scales_that_lie_row_by_row_are_found(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known fault: right in value, and copied into another order by every product."""
    made = triton_fp8_rows.empty

    def row_by_row(*asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = made(*asked)
        return values, scales.new_empty(scales.shape)

    monkeypatch.setattr(triton_fp8_rows, "empty", row_by_row)
    weight, scales = _weight(64, 256, block=(128, 128))
    with pytest.raises(AssertionError, match="else it copies them"):
        products.linear(_exact(products.ROWS, 256).bfloat16(), weight, scales)


def test_blocks_that_the_library_does_not_have_are_ours(products: Any, calls: Calls) -> None:
    weight, scales = _weight(160, 192, block=(64, 128))
    x = _exact(products.ROWS, 192).bfloat16()
    _close(products.linear(x, weight, scales, (64, 128)), fp8.linear_reference(x, weight, scales, (64, 128)), CLOSE)
    assert not calls.made
    assert deep_gemm_misfit((128, 128), (12, 64)) == "it takes rows in eights and columns in sixteens, found 12x64"
    assert not deep_gemm_misfit((128, 128), (4, 2816, 2048))


def kernels(moe: str, fp8_products: str) -> KernelConfig:
    return KernelConfig("triton", "triton", moe, "torch", fp8=fp8_products)


def test_each_of_its_products_is_chosen_by_name(products: Any) -> None:
    ours = backend("triton")
    both = chosen(kernels("deep_gemm", "deep_gemm"))
    assert (both.fp8_linear, both.fp8_gated, both.fp8_experts) == (products.linear, products.gated, products.experts)
    dense = chosen(kernels("triton", "deep_gemm"))
    assert (dense.fp8_linear, dense.fp8_experts) == (products.linear, ours.fp8_experts)
    experts = chosen(kernels("deep_gemm", "triton"))
    assert (experts.fp8_linear, experts.fp8_experts) == (ours.fp8_linear, products.experts)


def test_a_build_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where the wheel was compiled against another torch."""
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    for name in MODULES:
        ops.__dict__.pop(name, None)
        monkeypatch.delitem(sys.modules, f"tessera.ops.{name}", raising=False)
    with pytest.raises(ConfigError, match=r"module does not load.* 0\.1\.5\.post1 is one for torch 2\.11"):
        chosen(kernels("triton", "deep_gemm"))


_ids = partial(expert_ids, top_k=2, device=DEVICE)


@pytest.mark.parametrize("choice", CHOICES)
def test_experts_are_plain(products: Any, calls: Calls, choice: str) -> None:
    """Blocks are full, half full and less; activations between the products are rounded as ours are."""
    num_tokens, num = 150, 4
    x, weights = _exact(num_tokens, 264).bfloat16()[:, :256], torch.rand(num_tokens, 2, device=DEVICE)
    experts = _experts(num, 256, 128, (128, 128))
    for weight in experts:
        weight.scales[-1] = float("nan")
    ids = _ids(choice, num_tokens, num)
    y, places = products.padded_rows(x, *experts, ids)
    found = combine(y, ids, weights, places).float()
    expected = fp8.experts_reference(x, *experts, ids, weights).float()
    assert calls.made == ["grouped"] * 2
    assert (found - expected).norm() <= 0.1 * expected.norm()  # the interpreter cuts off, see test_fp8.py


@pytest.mark.parametrize(("num_tokens", "gated"), [(2, False), (2, True), (40, False), (40, True), (128, True)])
def test_a_shared_expert_is_added_with_the_others(products: Any, num_tokens: int, gated: bool) -> None:
    """As where it is added afterwards, but for one rounding; also where it is under way already."""
    block = (128, 128)
    x, experts = _exact(num_tokens, 256).bfloat16(), _experts(4, 256, 128, block)
    ids, weights = _ids("some held", num_tokens, 4), torch.rand(num_tokens, 2, device=DEVICE)
    w_in, w_out = (fp8.Fp8Weight(*_weight(*size, block=block), block) for size in ((256, 256), (256, 128)))
    gate = backend("triton").pack(torch.randn(1, 256, device=DEVICE).bfloat16() / 16) if gated else None
    for version in (backend("triton"), chosen(kernels("deep_gemm", "deep_gemm"))):
        shared = Shared(version.pack_fp8(w_in), version.pack_fp8(w_out), gate)
        of_experts, mixture = version.experts_of(experts[0])
        alone, found = of_experts(x, *experts, ids, weights), mixture(x, *experts, ids, weights, shared)
        rows = gated_mlp(x, shared.w_in, shared.w_out, version.gated_product)
        _close(found, version.add_gated(alone, rows, x, gate), CLOSE)
        assert torch.equal(found, mixture(x, *experts, ids, weights, shared, lambda rows=rows: rows))
        assert torch.equal(mixture(x, *experts, ids, weights, None), alone)


def test_few_rows_of_experts_and_other_blocks_are_ours(products: Any, calls: Calls) -> None:
    x, ids, weights = _exact(9, 256).bfloat16(), _ids("any", 9, 4), torch.rand(9, 2, device=DEVICE)
    products.experts(x, *_experts(4, 256, 128, (128, 128)), ids, weights)
    many = products.EXPERT_ROWS * 4 // 2
    x, ids, weights = _exact(many, 192).bfloat16(), _ids("any", many, 4), torch.rand(many, 2, device=DEVICE)
    products.experts(x, *_experts(4, 192, 64, (64, 128)), ids, weights)
    assert not calls.made
    products.experts(x, *_experts(4, 192, 128, (128, 128)), ids, weights)
    assert calls.made == ["grouped"] * 2


@pytest.mark.parametrize("choice", CHOICES)
def test_rows_are_spread_over_blocks_of_their_experts(choice: str) -> None:
    """Every held row is in one place, quantised as it would be alone; all rows of a block are of its expert or none."""
    x, block = _exact(60, 200), 64
    ids = _ids(choice, 60, 5)
    found = triton_fp8_rows.spread(x, sort_rows(ids, 5, block), 2, block, 64)
    (values, scales), flat = found.rows, ids.flatten()
    held = (flat >= 0).nonzero().flatten()
    places = found.places[held].long()
    assert torch.equal(found.groups[places].long(), flat[held])
    assert (found.groups >= 0).sum() == len(held)
    plain = fp8.quantize(x, 64)
    assert torch.equal(values[places].float(), plain[0][held // 2].float())
    torch.testing.assert_close(scales[places], plain[1][held // 2], rtol=1e-6, atol=0)
    for own in found.groups.view(-1, block).tolist():
        assert len({expert for expert in own if expert >= 0}) <= 1
        assert own[0] >= 0 or set(own) == {-1}, "padding follows rows"


@pytest.mark.gpu
@library
@pytest.mark.timeout(600)  # kernels are compiled when they are met first
@pytest.mark.parametrize("num_tokens", [128, 1000])
def test_real_products(num_tokens: int) -> None:
    from tessera.ops import deep_gemm_fp8

    for rows, columns in ((3648, 2048), (2048, 2816), (2048, 1408), (72, 528)):
        x, (weight, scales) = (
            torch.randn(num_tokens, columns, device=DEVICE).bfloat16(),
            _weight(rows, columns, block=(128, 128)),
        )
        _close(deep_gemm_fp8.linear(x, weight, scales), fp8.linear_reference(x, weight, scales), CLOSE)


@pytest.mark.gpu
@library
@pytest.mark.timeout(600)
@pytest.mark.parametrize("choice", CHOICES)
def test_real_experts(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product is that of the numbers that it was given, which are the twin's in the first one."""
    from tessera.ops import deep_gemm_fp8

    made: list[tuple[Any, ...]] = []
    grouped = deep_gemm_fp8._grouped
    monkeypatch.setattr(
        deep_gemm_fp8, "_grouped", lambda *given: made.append((*given, grouped(*given))) or made[-1][-1]
    )
    x, weights = torch.randn(1500, 2048, device=DEVICE).bfloat16(), torch.rand(1500, 2, device=DEVICE)
    experts = _experts(16, 2048, 1408, (128, 128))
    experts[0].scales[-1] = float("nan")
    ids = _ids(choice, 1500, 16)
    y, places = deep_gemm_fp8.padded_rows(x, *experts, ids)
    found = combine(y, ids, weights, places).float()
    expected = fp8.experts_reference(x, *experts, ids, weights).float()
    assert (found - expected).norm() <= FLIPPED * expected.norm()
    for (values, scales), w, ends, _, product in made:
        for expert, rows in held(ends):
            given = fp8.dequantize(values[rows], scales[rows], (1, 128))
            _close(product[rows], (given @ w.plain(expert, torch.float32).T).bfloat16(), CLOSE)
    (values, scales), flat = made[0][0], ids.flatten()
    routed = (flat >= 0).nonzero().flatten()
    for given, plain in zip((values, scales), fp8.quantize(x), strict=True):
        assert torch.equal(given[places[routed].long()].float(), plain[routed // 2].float())


def held(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and their rows, which begin with a block."""
    end = 0
    for expert, last in enumerate(ends.tolist()):
        first = -(-end // 128) * 128
        if last > first:
            yield expert, slice(first, last)
        end = last
