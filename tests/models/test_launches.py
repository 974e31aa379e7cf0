"""Promise: our kernels make the same model as the plain ones, and a decode of one token is few launches a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from models.harness import make_rank
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.parts import PARTS
from tessera.core.weights import weight_table
from tessera.models.decoder import Layer
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.ops.backend import TORCH, backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the harness is for a CPU")

ATTENTION = ["_product", "_write_heads", "_decode", "_product"]  # long contexts add a sum of splits
DELTA = ["_product", "_step", "_product"]
LATENT = ["_product", "_write_latents", "_by_head", "_latents", "_join_few", "_product"]
DENSE = ["_product", "_product"]
EXPERTS = ["_score_and_route", "_gate_up", "_down"]  # the shared one among them
COUNTS = ["aten::zeros"]  # of those that have read a window: once a step
NORM = ["_rmsnorm_kernel"]


def layer(mixer: list[str], mlp: list[str]) -> list[str]:
    return [*NORM, *mixer, *NORM, *mlp]


GATED = [*ATTENTION[:-1], "_gate_kernel", *ATTENTION[-1:]]
MODELS = {
    "qwen3": (tiny.QWEN3, 2 * layer(ATTENTION, DENSE)),
    "hybrid": (tiny.HYBRID, [*layer(DELTA, EXPERTS), *COUNTS, *2 * layer(DELTA, EXPERTS), *layer(GATED, EXPERTS)]),
    "mla": (tiny.MLA, layer(LATENT, DENSE) + 2 * layer(LATENT, EXPERTS)),
}


class Computing(TorchDispatchMode):
    """Notes torch's ops that would be launches: those that are no view and no fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused and _computes(func, args, result):
            self.ops.append(func.name())
        return result


def _computes(func: Any, args: Any, result: Any) -> bool:
    """`aten::to` calls itself a view and may copy."""
    if "empty" in func.name() or isinstance(result, torch.dtype):
        return False
    if not func.is_view:
        return True
    return (
        isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr()
    )


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of our kernels in the order in which they are launched; after each layer those of torch's."""
    from triton.runtime.jit import KernelInterface

    seen: list[str] = []
    computing = Computing()
    good, good_layer = KernelInterface.__getitem__, Layer.__call__

    def noted(self: Any, grid: Any) -> Callable[..., Any]:
        seen.append(self.fn.__name__)

        def launch(*args: Any, **options: Any) -> None:
            computing.paused = True  # the interpreter's own
            good(self, grid)(*args, **options)
            computing.paused = False

        return launch

    def watched(*args: Any) -> Any:
        with computing:
            result = yield from good_layer(*args)
        seen.extend(computing.ops)
        computing.ops.clear()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", noted)
        patch.setattr(Layer, "__call__", watched)
        yield seen


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_one_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected = MODELS[name]
    spec = read_spec(config)
    source = Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, 3)
    plain, ours = (make_rank(spec, source, backend=one) for one in (TORCH, backend("triton")))
    prompt = [5, 17, 3, 60, 21, 9, 33]
    torch.testing.assert_close(ours.run([(0, prompt)]), plain.run([(0, prompt)]), rtol=1e-4, atol=1e-4)
    with launches(monkeypatch) as seen:
        found = ours.run([(0, [7])])
    torch.testing.assert_close(found, plain.run([(0, [7])]), rtol=1e-4, atol=1e-4)
    assert seen == [*expected, *NORM, "_product"]


@pytest.mark.parametrize(("name", "tokens"), [("hybrid", 1), ("mla", 20)])
def test_wide_parts_of_one_rank_take_no_launch_more(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody else adds to is rounded where it is summed."""
    spec = read_spec(MODELS[name][0])
    source = Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, 3)
    seen = {}
    for wide in PARTS:
        rank = make_rank(spec, source, torch.bfloat16, backend=backend("triton"), wide=PARTS[wide])
        rank.run([(0, [5, 17, 3])])
        with launches(monkeypatch) as seen[wide]:
            rank.run([(0, list(range(1, tokens + 1)))])
    own = {wide: [name for name in names if name.startswith("_")] for wide, names in seen.items()}
    assert own["model"] == own["sums"] == own["float32"]
    for names in seen.values():
        assert ("aten::to.dtype", *NORM) not in pairwise(names), "the sum is rounded apart"
