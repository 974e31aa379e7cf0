"""Promise: the layout never changes the answer. Logits and caches of every layout equal those of one rank."""

from __future__ import annotations

from functools import lru_cache

import pytest

from models.layouts import FAMILIES, Outcome, compute, differences, pairwise, spec_and_noise
from tessera.core.errors import LayoutError
from tessera.core.mesh import SINGLE, instance_mesh

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


@lru_cache(maxsize=1)
def alone(family: str, seed: int) -> Outcome:
    return compute(*spec_and_noise(family, seed), SINGLE)


def check(family: str, seed: int, layout: Layout) -> None:
    mesh = instance_mesh(*layout)
    spec, source = spec_and_noise(family, seed)
    worst = differences(spec, compute(spec, source, mesh), alone(family, seed), mesh)
    assert len(worst) > 1
    wrong = {name: value for name, value in worst.items() if not value < TOLERANCE}
    assert not wrong, f"{family} of seed {seed} on {layout}: {wrong}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_some_layouts(family: str) -> None:
    """All pairs of settings, each layout with two families; two models of each."""
    covering = [LAYOUTS[i] for i in pairwise(LAYOUTS)]
    nth = FAMILIES.index(family) % 4
    for i, layout in enumerate(covering[nth::4]):
        check(family, 4 * (i % 2), layout)


@pytest.mark.parametrize("layout", [(4, 1, 2, 4, False, False), (4, 2, 4, 2, False, True), (4, 4, 2, 1, True, True)])
@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "deepseek_v2"])
def test_all_kinds_of_layers_on_mixed_layouts(family: str, layout: Layout) -> None:
    check(family, 2, layout)


def test_groups_that_cut_each_other_are_refused() -> None:
    with pytest.raises(LayoutError, match="dense 3 cuts attention groups of 2"):
        instance_mesh(tp=6, dp=3, dense_tp=3)
