"""Products in fp8: the scheme against wide products, the kernels against the plain twins. Outputs are poisoned.

Products get inputs that are exact in fp8: Triton's interpreter (no CUDA device) cuts a number off where it makes an fp8
one of it, where the device rounds. Between the experts' products it therefore loses twice as much.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ops.cases import TOLERANCE, stored_narrow
from tessera.ops import fp8, triton_fp8, triton_fp8_experts, triton_fp8_rows
from tessera.ops.backend import backend
from tessera.ops.fused import Shared, gated_mlp, silu_mul
from tessera.ops.linear import linear, unrounded
from tessera.ops.moe import Kept
from tessera.ops.triton_combine import combine
from tessera.ops.triton_fp8 import Tile, Tiles
from tessera.ops.triton_linear import gated_product
from tessera.ops.triton_sort import Sorted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")
SUMS = 1e-3 if DEVICE == "cuda" else 1e-5  # Hopper's tensor cores keep about 14 bits while they add products of fp8


def _weight(*shape: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    values = (torch.randn(*shape, device=DEVICE) * 50).to(torch.float8_e4m3fn)
    scaled = [-(-size // step) for size, step in zip(shape[-2:], block, strict=True)]
    return values, (torch.rand(*shape[:-2], *scaled, device=DEVICE) + 0.5) / 50 * shape[-1] ** -0.5


def _exact(*shape: int) -> torch.Tensor:
    """Small whole numbers, with one 7 in every group: scales are powers of two times 7 / 448."""
    x = torch.randint(-3, 4, shape, device=DEVICE).float()
    x[:, ::16] = 7
    return x


def _close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert found.dtype == expected.dtype
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference <= limit, f"{difference:.3g} of the largest apart"


def test_quantizing_keeps_three_bits_of_every_number() -> None:
    x = torch.randn(5, 300) * torch.logspace(-3, 3, 5)[:, None]
    x[0, :128] = 0
    values, scales = fp8.quantize(x)
    assert (values.dtype, scales.shape) == (torch.float8_e4m3fn, (5, 3))
    largest = torch.nn.functional.pad(x, (0, 84)).unflatten(1, (3, 128)).abs().amax(-1)
    again = fp8.requantized(x)
    step = (largest / 448 * 2**-9).repeat_interleave(128, 1)[:, :300]  # the smallest number, where few bits are left
    assert ((again - x).abs() <= torch.maximum(x.abs() / 16, step) + 1e-12).all()


def test_the_scheme_is_near_the_wide_product() -> None:
    x, (weight, scales) = torch.randn(4, 256), _weight(96, 256, block=(32, 128))
    wide = x.to(DEVICE) @ fp8.dequantize(weight, scales, (32, 128)).T
    _close(fp8.linear_reference(x.to(DEVICE), weight, scales, (32, 128)), wide, 0.05)


@pytest.mark.parametrize("columns", [128, 200])
def test_quantize_kernel(columns: int) -> None:
    x = _exact(3, columns + 8)[:, :columns]  # rows with gaps between them
    x[1] = 0
    for found, expected in zip(triton_fp8.quantize(x), fp8.quantize(x), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_quantising_has_the_same_bits_everywhere() -> None:
    """By the kernel, and by the twins on either device. Known fault: on CUDA the twin's scales were half of them one
    step off, and one number in 600, which lies between two of fp8's, went the other way."""
    x = torch.randn(300, 2048).bfloat16()
    for version in (triton_fp8.quantize(x.cuda()), fp8.quantize(x.cuda())):
        for found, expected in zip(version, fp8.quantize(x), strict=True):
            assert torch.equal(found.cpu().float(), expected.float())
    on_both = (fp8.quantize_weight(x.to(device).float(), (128, 128)) for device in ("cpu", "cuda"))
    for one, other in zip(*on_both, strict=True):
        assert torch.equal(one.float(), other.cpu().float())


@pytest.mark.parametrize("kernel", ["_quantize", "_spread"])
def test_rows_may_be_more_than_a_grid_has_in_its_second_dimension(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """65,535 on CUDA. Known fault: 16 groups of 16,384 tokens that visit 8 experts each could not be launched."""
    grids: list[tuple[int, ...]] = []

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(triton_fp8_rows, kernel, Launched())
    x, num_rows, block = torch.empty(1 << 22, 256, device="meta"), 1 << 22, 128
    if kernel == "_quantize":
        triton_fp8_rows.quantize(x)
    else:
        ints = {"dtype": torch.int32, "device": "meta"}
        listed = (torch.empty(*size, **ints) for size in ((num_rows,), (num_rows // block, 3), (1,)))
        triton_fp8_rows.spread(x, Sorted(*listed), 1, block)
    assert grids == [(2 * num_rows // triton_fp8_rows.ROWS,)]


@pytest.mark.parametrize("block", [(128, 128), (64, 64), (32, 64)])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 20])
def test_linear_kernel(num_tokens: int, block: tuple[int, int]) -> None:
    x, (weight, scales) = _exact(num_tokens, 192), _weight(80, 192, block=block)
    found = triton_fp8.linear(x, weight, scales, block)
    assert found.shape == (num_tokens, 80)
    if num_tokens:
        _close(found, fp8.linear_reference(x, weight, scales, block), SUMS)


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_gated_product(num_tokens: int) -> None:
    """As `gated_product` finds it in a packed weight, against the plain product and what follows it."""
    x, block = _exact(num_tokens, 192), (32, 64)
    weight = fp8.Fp8Weight(*_weight(160, 192, block=block), block)
    packed = fp8.pack(weight, triton_fp8.linear, triton_fp8.gated)
    expected = silu_mul(fp8.linear_reference(x, weight.values, weight.scales, block))
    _close(gated_product(x, packed), expected, SUMS)


def _experts(num: int, hidden: int, inner: int, *blocks: tuple[int, int]) -> list[fp8.Fp8Weight]:
    up, down = blocks[0], blocks[-1]
    w13, w2 = _weight(num, 2 * inner, hidden, block=up), _weight(num, hidden, inner, block=down)
    return [fp8.Fp8Weight(*w13, up), fp8.Fp8Weight(*w2, down)]


@pytest.mark.parametrize("num_tokens", [2, 9])
@pytest.mark.parametrize("blocks", [[(128, 128)], [(32, 64)], [(32, 64), (128, 64)]], ids=str)
def test_experts_kernel(blocks: list[tuple[int, int]], num_tokens: int) -> None:
    inner, x = 128 if blocks[0][0] == 128 else 96, _exact(num_tokens, 192)
    experts = _experts(5, 192, inner, *blocks)
    ids, weights = torch.rand(num_tokens, 5).topk(3, -1).indices.to(DEVICE), torch.rand(num_tokens, 3, device=DEVICE)
    ids[ids == 2] = -1
    ids[-1, 1] = -1
    for weight in experts:
        weight.scales[2] = float("nan")
    found = triton_fp8_experts.experts(x, *experts, ids, weights)
    _close(found, fp8.experts_reference(x, *experts, ids, weights), 0.02 if DEVICE == "cuda" else 0.1)


def _wide(found: torch.Tensor, rounded: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """`found` is the wide form of what `rounded` is in bfloat16."""
    assert (found.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert found.shape == rounded.shape == expected.shape
    if len(found):
        _close(found, expected, limit)
        assert (found != found.bfloat16()).float().mean() > 0.5, "it is rounded"
        _close(rounded, found.bfloat16(), 0.02)


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_a_product_that_is_not_rounded(num_tokens: int) -> None:
    """By vectors and by tiles, and of what a gate gives; nothing after the sum is rounded to bfloat16."""
    block = (32, 64)
    x = _exact(num_tokens, 192).bfloat16()
    into, out = (fp8.Fp8Weight(*_weight(*size, block=block), block) for size in ((384, 192), (80, 192)))
    ours = [fp8.pack(w, triton_fp8.linear, triton_fp8.gated, triton_fp8.after_gate) for w in (into, out)]
    plain = [fp8.pack(w) for w in (into, out)]
    _wide(unrounded(x, ours[1]), linear(x, ours[1]), unrounded(x, plain[1]), SUMS)
    narrow, wide, expected = (
        gated_mlp(x, *w, gated_product, form) for w, form in ((ours, False), (ours, True), (plain, True))
    )
    _wide(wide, narrow, expected, 0.02 if DEVICE == "cuda" else 0.1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 2, 9])
def test_experts_that_are_not_rounded(num_tokens: int, shared: bool) -> None:
    """Few rows and many, alone and with a shared expert."""
    block = (32, 64)
    x, experts = _exact(num_tokens, 192).bfloat16(), _experts(5, 192, 96, block)
    ids, weights = torch.rand(num_tokens, 5).topk(3, -1).indices.to(DEVICE), torch.rand(num_tokens, 3, device=DEVICE)
    ids[ids == 2] = -1
    versions = []
    for name in ("triton", "torch"):
        version, beside = backend(name), None
        if shared:
            gate = version.pack(torch.full((1, 192), 0.01, device=DEVICE).bfloat16())
            sizes = ((192, 192), (192, 96))
            torch.manual_seed(1)
            made = (fp8.Fp8Weight(*_weight(*size, block=block), block) for size in sizes)
            beside = Shared(*map(version.pack_fp8, made), gate)
        mixture = version.experts_of(experts[0])[1]
        versions.append([mixture(x, *experts, ids, weights, beside, kept=Kept(wide, wide)) for wide in (True, False)])
        once = mixture(x, *experts, ids, weights, beside, kept=Kept(True, True, x.dtype))
        sums = mixture(x, *experts, ids, weights, beside, kept=Kept(False, True, torch.float32))
        assert sums.dtype == torch.float32
        assert not len(x) or (sums != sums.bfloat16()).float().mean() > 0.5, "the sum is rounded"
        assert not len(x) or not torch.equal(sums, versions[-1][0]), "no expert's row is rounded"
        store = stored_narrow if name == "triton" else torch.Tensor.bfloat16
        assert torch.equal(once, store(versions[-1][0])), "only the sum is rounded"
    _wide(*versions[0], versions[1][0], 0.02 if DEVICE == "cuda" else 0.1)


@pytest.mark.parametrize("num_tokens", [2, 30])
def test_an_expert_in_two_halves_is_the_whole_one_but_for_the_order(num_tokens: int) -> None:
    """The parts of two ranks, which hold half of each expert's width: a sum of parts in bfloat16 is far off that."""
    x, block = _exact(num_tokens, 128).bfloat16(), (32, 64)
    whole = _experts(4, 128, 128, block)
    ids, weights = torch.rand(num_tokens, 4).topk(2, -1).indices.to(DEVICE), torch.rand(num_tokens, 2, device=DEVICE)

    def half(w: fp8.Fp8Weight, nth: int, dim: int) -> fp8.Fp8Weight:
        """Of each of the two sections of 128 rows, or of the 128 columns."""
        parts = 2 if dim == 1 else 1
        values, scales = (
            t.unflatten(dim, (parts, 2, -1)).select(dim + 1, nth).flatten(dim, dim + 1).contiguous()
            for t in (w.values.view(torch.uint8), w.scales)
        )
        return fp8.Fp8Weight(values.view(torch.float8_e4m3fn), scales, block)

    halves = [[half(whole[0], nth, 1), half(whole[1], nth, 2)] for nth in (0, 1)]

    def apart(**how: bool) -> float:
        parts = [triton_fp8_experts.experts(x, *half, ids, weights, **how).float() for half in halves]
        whole_one = triton_fp8_experts.experts(x, *whole, ids, weights, unrounded=True)
        return float((whole_one - sum(parts)).abs().max() / whole_one.abs().max())

    assert apart(unrounded=True) < 1e-5
    assert apart() > 1e-3


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 2, group=2), Tile(32, 32, 4, 3, group=3)], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (32, 64)])
def test_tiles_of_a_product(tile: Tile, block: tuple[int, int]) -> None:
    """In any order of tiles all are there: 100 rows and 208 columns end inside one."""
    x, (weight, scales) = _exact(100, 208), _weight(80, 208, block=block)
    found = triton_fp8.linear(x, weight, scales, block, tile)
    _close(found, fp8.linear_reference(x, weight, scales, block), SUMS)


def test_tiles_of_experts() -> None:
    """In any order of theirs; 160 columns are 2.5 groups."""
    x, experts = _exact(40, 192), _experts(5, 192, 160, (32, 64))
    ids, weights = torch.rand(40, 5).topk(3, -1).indices.to(DEVICE), torch.rand(40, 3, device=DEVICE)
    ids[ids == 2] = -1
    up, down = Tile(16, 32, 4, 2, 2), Tile(16, 32, 4, 2, 3)
    found = combine(triton_fp8.rows_of_experts(x, *experts, ids, Tiles(0, up, up, down)), ids, weights)
    _close(found, fp8.experts_reference(x, *experts, ids, weights), 0.02 if DEVICE == "cuda" else 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 500, 4096])
def test_real_sizes(num_tokens: int) -> None:
    x, (weight, scales) = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16(), _weight(4096, 2048, block=(128, 128))
    _close(triton_fp8.linear(x, weight, scales), fp8.linear_reference(x, weight, scales), TOLERANCE[torch.bfloat16])
    experts = _experts(32, 2048, 512, (128, 128))
    ids = torch.rand(num_tokens, 32, device=DEVICE).topk(6, -1).indices
    weights = torch.rand(num_tokens, 6, device=DEVICE)
    found = triton_fp8_experts.experts(x, *experts, ids, weights).float()
    expected = fp8.experts_reference(x, *experts, ids, weights).float()
    # Between the products a number on the border of two fp8 numbers goes either way: few outputs differ by more.
    assert (found - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()
    _close(found, expected, 2 * TOLERANCE[torch.bfloat16])
