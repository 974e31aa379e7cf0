"""Promise: each row of the memory table is what the thing beside it takes, or more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from held import Held
from tessera.comm import peers
from tessera.comm.dist import nccl_bytes
from tessera.comm.peer_memory import MOST_RANKS, peers_bytes
from tessera.core.config.needs import Sketch, counted, total
from tessera.core.config.types import GraphSizes, KernelConfig, MeshConfig
from tessera.core.families import read_spec
from tessera.core.spec import DeltaSpec
from tessera.ops import sample
from tessera.ops.flashinfer_attention import WORKSPACE, workspace_bytes
from tessera.ops.rope import rope_bytes, rope_tables
from tessera.ops.sample import Adjustments, Drawing, Penalties, adjust, draw_reference, token_logprobs
from tessera.run import sampler
from tessera.run.graphs import graph_bytes
from tessera.run.hardware import CONTEXT, device_bytes
from tessera.run.needs import NEEDS, kept_for_steps
from tessera.run.sampler import draw_bytes
from tessera.run.table import RowTable, table_bytes

PLAIN = KernelConfig("triton", "triton", "triton", "torch")
ONE = GraphSizes((1,))
GRAPHED = replace(PLAIN, graphs=GraphSizes((1, 2, 4), (2, 4), (64, 128)))
ALONE = MeshConfig("cuda")


def sketch_of(model: str = "qwen3", **changes: Any) -> Sketch:
    return Sketch(**{
        "spec": read_spec(tiny.TINY[model]), "ranks": ALONE, "dtype": "float32",
        "kernels": PLAIN, "tokens": 256, "rows": 8, "context": 200, "page_size": 16, **changes,
    })  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 64), st.booleans())
def test_row_tables(rows: int, context: int, page: int, graphed: bool) -> None:
    table = RowTable(rows, context, page, (), mirror_pages=graphed)
    held = table.tokens.nbytes + (table.pages_on_device.nbytes if table.pages_on_device is not None else 0)
    kernels = GRAPHED if graphed else PLAIN
    found = table_bytes(sketch_of(rows=rows, context=context, page_size=page, kernels=kernels))
    assert held < found <= held + 4 * table.pages.size + 4 * table.pages.shape[1], "and the pages of a step"


@pytest.mark.parametrize("model", tiny.TINY)
def test_rotations(model: str) -> None:
    sketch, held = sketch_of(model), 0
    for rope in {la.mixer.rope for la in sketch.spec.layers if not isinstance(la.mixer, DeltaSpec)}:
        tables = rope_tables(rope, sketch.context)
        held += tables.cos.nbytes + tables.sin.nbytes
    assert rope_bytes(sketch) == held


@pytest.mark.parametrize("at_once", [8, 3, 1])
def test_drawing_with_every_filter_and_every_penalty(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many rows at once; what a device's sort needs inside is less than the noise that comes after it."""
    rows, vocab = 8, 4096
    monkeypatch.setattr(sampler, "BLOCK_ELEMENTS", 0)  # prompts that are scored would hide it
    for module in (sampler, sample):
        monkeypatch.setattr(module, "DRAW_ELEMENTS", at_once * vocab)
    sketch = sketch_of(rows=rows)
    sketch = replace(sketch, spec=replace(sketch.spec, vocab_size=vocab))
    logits, ones = torch.randn(rows, vocab), torch.ones(rows)
    tokens, last = torch.randint(0, vocab, (rows, 50)), torch.full((rows,), 50)
    every = torch.arange(rows)
    drawing = Drawing(every, ones, every, every, torch.full((rows,), 9), 0.9 * ones, 0.01 * ones)
    with torch.inference_mode(), Held() as held:
        adjust(logits, Adjustments(Penalties(every, tokens, last - 1, last, ones, ones, ones)))
        draw_reference(logits, drawing)
        token_logprobs(logits, tokens, 20)
    counted = draw_bytes(sketch) - 3 * rows * vocab * sketch.element
    assert logits.nbytes + held.peak <= counted <= 1.2 * (logits.nbytes + held.peak)


def groups_of(ranks: MeshConfig) -> list[int]:
    return [len(group) for group in ranks.mesh.groups(0)]


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 1, 1), (2, 1, 1), (4, 2, 2), (8, 8, 8), (16, 1, 1)])
def test_collectives(tp: int, dp: int, ep: int) -> None:
    ranks = MeshConfig("cuda", tp=tp, dp=dp, ep=ep, dense_tp=tp, collectives="nccl", peers=True)
    worlds = [world for world in groups_of(ranks) if world <= MOST_RANKS]
    held = sum(sum(peers.sizes(world)) + peers.CHANNELS * 4 for world in worlds)
    assert peers_bytes(sketch_of(ranks=ranks)) == held
    assert (held > 0) == (1 < tp <= MOST_RANKS)
    assert peers_bytes(sketch_of(ranks=replace(ranks, peers=False))) == 0
    assert (nccl_bytes(sketch_of(ranks=ranks)) > 0) == (tp > 1)
    assert nccl_bytes(sketch_of(ranks=replace(ranks, collectives="gloo"))) == 0


def test_two_ranks_share_67_megabytes() -> None:
    assert peers_bytes(sketch_of(ranks=MeshConfig("cuda", tp=2, dense_tp=2, peers=True))) // 10**6 == 67


@given(st.integers(1, 8), st.integers(1, 8))
def test_groups_are_those_of_the_axes(dp: int, attn: int) -> None:
    mesh = MeshConfig("cuda", tp=dp * attn, dp=dp, dense_tp=dp * attn).mesh
    for rank in range(mesh.size):
        groups = mesh.groups(rank)
        assert groups == sorted(set(groups))
        assert set(groups) == {g for a in mesh.axes if len(g := mesh.group(rank, a.name)) > 1}
        assert all(rank in group for group in groups)


def test_graphs() -> None:
    assert graph_bytes(sketch_of()) == 0
    small, large = (
        graph_bytes(sketch_of(kernels=replace(PLAIN, graphs=g))) for g in (GraphSizes((1,)), GRAPHED.graphs)
    )
    assert 0 < small < large
    whole, halves = (graph_bytes(sketch_of(kernels=GRAPHED, split_from=n)) for n in (32768, 64))
    assert large == whole < halves
    assert large < graph_bytes(replace(sketch_of("qwen3", kernels=GRAPHED), dtype="float64"))


def test_the_workspace_is_flashinfers() -> None:
    assert workspace_bytes(sketch_of()) == 0
    for model in tiny.TINY:
        found = workspace_bytes(sketch_of(model, kernels=replace(PLAIN, attention="flashinfer")))
        assert WORKSPACE < found < 2 * WORKSPACE


def test_a_rank_that_is_a_process_has_a_context_of_its_own() -> None:
    alone, one = (device_bytes(sketch_of(ranks=r)) for r in (ALONE, MeshConfig("cuda", tp=2, dense_tp=2)))
    assert one - alone == CONTEXT
    assert device_bytes(sketch_of(ranks=MeshConfig("cpu"))) == 0


def test_the_table_has_the_rows_that_are_not_empty() -> None:
    ranks = MeshConfig("cuda", tp=2, dense_tp=2, collectives="nccl", peers=True)
    kernels = replace(GRAPHED, attention="flashinfer")
    rows = counted(NEEDS, sketch_of(ranks=ranks, kernels=kernels))
    assert [name for name, _ in rows] == [name for name, _ in NEEDS]
    assert total(rows) == sum(size for _, size in rows)
    assert kept_for_steps(rows) == dict(rows)["largest step"] + dict(rows)["logits and drawing"]
    on_cpu = counted(NEEDS, sketch_of(ranks=MeshConfig("cpu")))
    assert [name for name, _ in on_cpu] == ["row tables", "rotations", "largest step", "logits and drawing"]
