"""What the tests on a CUDA device ask for resolves there: seen on any machine, and not first on the device."""

from __future__ import annotations

import pytest

from run.test_cuda import CHOSEN
from test_invariance import LAYOUTS
from tiny import TINY, resolved, tiny_model


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layout", CHOSEN)
def test_the_layouts_chosen_resolve_for_a_cuda_device(name: str, layout: str) -> None:
    config = resolved(tiny_model(name).spec, device="cuda", dtype="float64", **LAYOUTS[layout]).config
    assert (config.mesh.device, config.mesh.collectives) == ("cuda", "nccl")
