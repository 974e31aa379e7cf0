"""Promise: the layout never changes the answer. Logits and caches of every layout equal those of one rank."""

from __future__ import annotations

from functools import partial

import pytest

from comm.ranks import as_processes, as_threads, raise_first, run_program
from matrix.points import cover
from models.layouts import FAMILIES, alone, compare, compute, differences
from ports import free_port
from tessera.comm.alone import Alone
from tessera.core.errors import LayoutError
from tessera.core.mesh import SINGLE, instance_mesh
from tessera.core.weights import weight_table
from tessera.models.folder import find_model, open_source, packaged_models, read_model

TOLERANCE = 1e-9
# (tp, dp, ep, dense TP, dp-lm-head, all-to-all)
Layout = tuple[int, int, int, int, bool, bool]
LAYOUTS: list[Layout] = [
    (tp, dp, ep, dense, lm_head, travel)
    for tp in (2, 4)
    for dp in (1, 2, 4)
    for ep in (1, 2, 4)
    for dense in (1, 2, 4)
    for lm_head in (False, True)
    for travel in (False, True)
    if max(dp, ep, dense) <= tp and not (lm_head and dp == 1) and not (travel and dense < tp)
]


def check(family: str, seed: int, layout: Layout) -> None:
    alone(family, seed)  # once for all threads
    results = as_threads(instance_mesh(*layout), partial(compare, family=family, seed=seed))
    raise_first(results)
    judge(results, f"{family} of seed {seed} on {layout}")


def judge(results: list[dict[str, float]], what: str) -> None:
    for rank, worst in enumerate(results):
        assert len(worst) > 1
        wrong = {name: value for name, value in worst.items() if not value < TOLERANCE}
        assert not wrong, f"{what}, rank {rank}: {wrong}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_some_layouts(family: str) -> None:
    """All pairs of settings, each layout with two families; two models of each."""
    covering = [LAYOUTS[i] for i in cover(LAYOUTS, 2)]
    nth = FAMILIES.index(family) % 4
    for i, layout in enumerate(covering[nth::4]):
        check(family, 4 * (i % 2), layout)


@pytest.mark.parametrize("layout", [(4, 1, 2, 4, False, False), (4, 2, 4, 2, False, True), (4, 4, 2, 1, True, True)])
@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "deepseek_v2"])
def test_all_kinds_of_layers_on_mixed_layouts(family: str, layout: Layout) -> None:
    check(family, 2, layout)


@pytest.mark.parametrize("name", packaged_models())
def test_packaged_models_on_sixteen_ranks(name: str) -> None:
    folder = find_model(name)
    spec = read_model(folder)
    source = open_source(folder, spec, weight_table(spec, SINGLE))
    one = compute(Alone(), spec, source)
    for layout in ((16, 4, 8, 16, True, True), (16, 4, 16, 4, False, False)):
        ranks = as_threads(
            instance_mesh(*layout), lambda comm: differences(spec, compute(comm, spec, source), one, comm)
        )
        raise_first(ranks)
        judge(ranks, f"{name} on {layout}")


def test_groups_that_cut_each_other_are_refused() -> None:
    with pytest.raises(LayoutError, match="dense 3 cuts attention groups of 2"):
        instance_mesh(tp=6, dp=3, dense_tp=3)


POINTS: list[tuple[str, Layout]] = [
    ("qwen3_5_moe_text", (4, 2, 2, 4, False, False)),
    ("qwen3_5_moe_text", (4, 2, 4, 4, True, True)),
    ("deepseek_v2", (4, 4, 2, 1, True, False)),
    ("deepseek_v2", (4, 1, 4, 2, False, True)),
    ("qwen3_moe", (4, 4, 4, 1, True, False)),
    ("qwen3_next", (4, 2, 1, 2, False, False)),
]


def every_point(rank: int, kind: str, ports: list[int]) -> list[dict[str, float]]:
    """A rank's part in all points, one after the other, in one process."""
    return [
        run_program(rank, instance_mesh(*layout), kind, port, partial(compare, family=family, seed=4), {})
        for (family, layout), port in zip(POINTS, ports, strict=True)
    ]


@pytest.mark.parametrize("kind", ["shared", "gloo"])
def test_ranks_that_are_processes(kind: str) -> None:
    results = as_processes(4, every_point, kind, [free_port() for _ in POINTS])
    raise_first(results)
    for i, point in enumerate(POINTS):
        judge([by_point[i] for by_point in results], f"{point} over {kind}")
