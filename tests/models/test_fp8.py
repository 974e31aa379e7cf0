"""Promise: weights in fp8 are the same on every layout, and so are the answers.

What is exact: values and scales, to the bit, whoever holds them and whether a checkpoint has them or they are made
while it is loaded. With the plain twin in float64 the logits are those of one rank but for the rounding of reordered
sums. In narrower dtypes that rounding may tip an activation over to the next of fp8's numbers, a step of up to 1/8, so
there the answers agree as they do between two batches, not better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comm.ranks import as_threads, raise_first
from core.test_families import DEEPSEEK_V3, QWEN3_5
from models.files import State, fused, made, quantised, write
from models.fp8_models import LAYOUTS, MODELS, Layout, alone, compare, quantised_model
from models.layouts import compute, differences
from models.test_layouts import judge
from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.core import scales
from tessera.core.errors import LayoutError, ModelError
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE, Mesh, instance_mesh
from tessera.core.quantization import Quantization
from tessera.core.scales import check_blocks, in_blocks, tile_blocks
from tessera.core.spec import ModelSpec
from tessera.core.tensors import TensorSpec
from tessera.core.weights import weight_table
from tessera.models.folder import open_source, read_model
from tessera.models.load import load_fp8, load_tile, load_weights
from tessera.models.quantizing import Quantizing
from tessera.models.source import Source
from tessera.ops.fp8 import Fp8Weight, dequantize, quantize_weight
from tessera.ops.linear import PackedLinear

BLOCK, FINE = (32, 8), (8, 8)
LOADING = Quantization(BLOCK, loading=True)
FAMILIES = {
    "llama": "llama-gqa",
    "qwen3_moe": "qwen3_moe-normalised",
    "qwen3_next": "qwen3_next-usual",
    "qwen3_5": "qwen3_5_moe_text-usual",
    "deepseek_v3": "deepseek_v3-yarn",
}
SIZES: list[tuple[int, ...]] = [(1, 1, 1, 1), (2, 1, 1, 2), (4, 1, 2, 4), (4, 2, 4, 1)]


def wide(weight: Fp8Weight) -> Tensor:
    return dequantize(weight.values, weight.scales, weight.block)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_cuts_of_the_whole_stored_or_made_while_loading(family: str, tmp_path: Path) -> None:
    """Every part of every rank, dequantised, against the same cut of the dequantised checkpoint."""
    state, config = made(FAMILIES[family], tmp_path / "plain")
    stored = _source(quantised(state, BLOCK)[0], config, tmp_path / "fp8")
    making = open_source(tmp_path / "plain", read_model(tmp_path / "plain"), (), quantization=LOADING)
    steps, seen = set(), set()
    for layout in SIZES:
        mesh = instance_mesh(*layout)
        for part in _parts(read_model(tmp_path / "plain"), mesh):
            for rank in range(mesh.size):
                expected = load_tile(stored, part, mesh, rank, torch.float32)
                one, other = (load_fp8(source, part, mesh, rank) for source in (stored, making))
                assert torch.equal(wide(one), expected), f"{part.name} on rank {rank} of {layout}"
                assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8)), part.name
                assert torch.equal(one.scales, other.scales), part.name
                assert torch.equal(load_tile(making, part, mesh, rank, torch.float32), expected)
                steps.add(one.block[0])
        seen |= {part.name for part in _parts(read_model(tmp_path / "plain"), mesh)}
    assert steps == {16, 32}, "some rank must cut a block of rows"
    assert len(seen) >= 4


def _source(state: State, config: dict[str, Any], folder: Path, block: tuple[int, int] = BLOCK) -> Source:
    write(folder, state, {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}})
    return open_source(folder, read_model(folder), ())


def _parts(spec: ModelSpec, mesh: Mesh) -> Iterator[TensorSpec]:
    """The parts in blocks of the tensors that can be cut so."""
    for tensor in weight_table(spec, mesh):
        parts = in_blocks(tensor, LOADING)
        try:
            check_blocks(parts, mesh)
        except LayoutError:
            continue
        yield from (part for part in parts.parts() if part.block is not None)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_the_same_experts(transposed: bool, tmp_path: Path) -> None:
    """As Qwen3.5's checkpoints keep them: gate | up and down of all experts in a tensor each, with their scales."""
    state, config = made("qwen3_moe-normalised", tmp_path / "plain")
    fp8, _ = quantised(state, FINE)
    each = _source(fp8, config, tmp_path / "each", FINE)
    together = _source(fused(fp8, transposed), config, tmp_path / "fused", FINE)
    spec, mesh = read_model(tmp_path / "each"), instance_mesh(tp=2, ep=2)
    table = weight_table(spec, mesh, quantization=spec.quantization)
    for tensor in [tensor for tensor in table if tensor.role == "experts"]:
        for rank in range(mesh.size):
            one, other = (load_fp8(source, tensor, mesh, rank) for source in (each, together))
            assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8)), tensor.name
            assert torch.equal(one.scales, other.scales), tensor.name


USUAL = [(QWEN3_5, (4, 1, 4, 4)), (QWEN3_5, (8, 8, 8, 8, False, True)), (DEEPSEEK_V3, (8,)), (DEEPSEEK_V3, (16, 1, 8))]


@pytest.mark.parametrize(("config", "layout"), USUAL, ids=lambda x: str(x)[:40])
def test_large_models_have_whole_blocks_on_their_usual_ranks(config: dict[str, Any], layout: Any) -> None:
    spec = read_spec({**config, "quantization_config": DEEPSEEK_V3["quantization_config"]})
    mesh = instance_mesh(*layout)
    for tensor in weight_table(spec, mesh, quantization=spec.quantization):
        for part in (part for part in tensor.parts() if part.block is not None):
            assert tile_blocks(part, mesh, mesh.size - 1)[0] == (128, 128), part.name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_every_family_on_every_layout(family: str, layout: Layout) -> None:
    check(family, layout)


def check(family: str, layout: Layout) -> None:
    alone(family)  # once for all threads
    results = as_threads(instance_mesh(*layout), partial(compare, family=family))
    raise_first(results)
    judge(results, f"{family} in fp8 on {layout}")


def test_quantised_weights_and_activations_are_seen_in_the_logits() -> None:
    """The comparison means something: without quantised activations, or weights, the logits are others."""
    spec, source = quantised_model("qwen3")
    quantization = spec.quantization
    assert quantization is not None
    found = alone("qwen3").logits[0][0]
    assert isinstance(source, Quantizing)
    plain = compute(Alone(), replace(spec, quantization=None), source.source).logits[0][0]
    weights = compute(Alone(), replace(spec, quantization=replace(quantization, dequantized=True)), source)
    differences = [(a - b).abs().max().item() for a, b in ((found, plain), (found, weights.logits[0][0]))]
    assert min(differences) > 1e-3
    assert max(differences) < 0.3 * found.abs().max()


Good = Callable[..., Any]


def transposed(good: Good, *args: Any) -> Any:
    """Scales of the wrong way round, where that is possible."""
    found = good(*args)
    return found.T.reshape(found.shape)


def of_the_first(good: Good, source: Quantizing, name: str, rows: Any, columns: Any, out: Tensor) -> Any:
    """Scales of the blocks of the first rank."""
    scales = good(source, name, rows, columns, out)
    scratch = torch.empty_like(out)
    return good(source, name, (0, rows[1]), (0, columns[1]), scratch)[: len(scales), : scales.shape[1]].expand_as(
        scales
    )


def own_blocks(good: Good, source: Quantizing, name: str, rows: Any, columns: Any, out: Tensor) -> Any:
    """Every rank quantises what it holds, in blocks that begin where its part begins."""
    shape = good(source, name, rows, columns, out).shape
    source.source.copy(name, rows, columns, plain := torch.empty(out.shape))
    values, found = quantize_weight(plain, source.quantization.block)
    out.copy_(values)
    return found[torch.arange(shape[0]).clamp(max=len(found) - 1)][:, : shape[1]]


FAULTS: list[tuple[Any, str, Good]] = [
    (Quantizing, "fp8", transposed),
    (Quantizing, "fp8", of_the_first),
    (Quantizing, "fp8", own_blocks),
]


@pytest.mark.parametrize(("where", "name", "fault"), FAULTS, ids=[f[2].__name__ for f in FAULTS])
def test_a_known_fault_is_seen(where: Any, name: str, fault: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    good = getattr(where, name)
    alone("qwen3_moe")
    monkeypatch.setattr(where, name, lambda *args: fault(good, *args))
    with pytest.raises((AssertionError, RuntimeError)):
        check("qwen3_moe", (2, 1, 1, 2, False, False))


def test_groups_of_activations_that_a_rank_cuts_change_the_answer_and_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of 16 on four ranks, groups of 32."""
    spec, source = quantised_model("qwen3")
    assert isinstance(source, Quantizing)
    wide = Quantization((32, 32))
    spec, source = replace(spec, quantization=wide), Quantizing(source.source, wide)
    one, mesh = compute(Alone(), spec, source), instance_mesh(4, 1, 1, 4)

    def run(comm: Comm) -> dict[str, float]:
        return differences(spec, compute(comm, spec, source), one, comm)

    with pytest.raises(LayoutError, match="cuts a group of 32 that fp8 activations share a scale in"):
        raise_first(as_threads(mesh, run))
    monkeypatch.setattr(scales, "check_groups", lambda *args: None)
    found = as_threads(mesh, run)
    raise_first(found)
    assert max(worst["logits"] for worst in found) > 1e-3


def test_a_tensor_that_is_not_as_the_config_says_is_refused(tmp_path: Path) -> None:
    state, config = made("qwen3_moe-normalised", tmp_path / "plain")
    fp8, _ = quantised(state, FINE)
    name = "model.layers.0.self_attn.o_proj.weight"
    fp8[name] = state[name]
    source = _source(fp8, config, tmp_path / "fp8", FINE)
    spec = read_model(tmp_path / "fp8")
    table = weight_table(spec, SINGLE, quantization=Quantization(FINE))
    with pytest.raises(ModelError, match=rf"{name}' is torch.float32, .* modules_to_not_convert, or .* dequantize"):
        load_weights(source, table, SINGLE, 0, torch.float32)
    kept = Quantization(FINE, ("model.layers.0.self_attn.o_proj",))
    table = weight_table(spec, SINGLE, quantization=kept)
    loaded = load_weights(source, table, SINGLE, 0, torch.float32)
    tile = loaded["layers.0.mixer.out"]
    assert isinstance(tile, PackedLinear)
    assert torch.equal(tile.weight, state[name])
    assert isinstance(loaded["layers.0.mlp.experts_in"], Fp8Weight)
