"""Promise: the rows of the memory table are at least what is held: counted on a CPU, where kernels are interpreted and
everything around them allocates as on a device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from held import Held
from models import layouts
from models.harness import make_rank
from tessera.comm.waits import drain
from tessera.core.config.needs import Sketch
from tessera.core.config.types import KernelConfig, MeshConfig
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.parts import NOTHING, PARTS
from tessera.core.weights import weight_table
from tessera.models import activations
from tessera.models.activations import recorded_bytes, step_bytes
from tessera.models.experts import MoE
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.models.parts import Batch
from tessera.ops import (
    flashinfer_attention,
    triton_attention,
    triton_delta_chunk,
    triton_latent,
    triton_mla,
    triton_moe,
)
from tessera.ops.backend import backend
from tessera.ops.segments import make_segments

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the harness is for a CPU")
LENGTH = 24
TRITON = KernelConfig("triton", "triton", "triton", "torch")
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5_moe_text", "deepseek_v3")
STEPS = {"one prompt": [24], "prompts and decodes": [12, 9, 1, 1], "decodes": [1] * 8}


@pytest.fixture(autouse=True)
def no_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not grow with a step would hide what does."""
    monkeypatch.setattr(activations, "PIECES", 0)
    for kernels in (triton_attention, triton_latent):
        monkeypatch.setattr(kernels, "splits_of", lambda *sizes: 1)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Tensors that are made, but for the interpreter's own."""
    from triton.runtime.jit import KernelInterface

    held, good = Held(), KernelInterface.__getitem__

    def paused(self: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            held.paused = True
            good(self, grid)(*args, **options)
            gc.collect()  # the interpreter keeps what it was given in cycles
            held.paused = False

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", paused)
    gc.collect()
    gc.freeze()
    with torch.inference_mode(), held:
        yield held
    gc.unfreeze()


def sketch_of(family: str, tokens: int, rows: int, context: int = LENGTH, **changes: Any) -> Sketch:
    spec, _ = layouts.spec_and_noise(family, 0)
    ranks = MeshConfig("cuda")
    return Sketch(**{
        "spec": spec, "ranks": ranks, "dtype": "float32", "kernels": TRITON, "tokens": tokens,
        "rows": rows, "context": context, "page_size": 4, **changes,
    })  # fmt: skip


@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_holds_no_more(family: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, source = layouts.spec_and_noise(family, 0)
    rank = make_rank(spec, source, backend=backend("triton"), sequences=len(lengths), length=LENGTH)
    rows, tokens = list(range(len(lengths))), torch.arange(sum(lengths), dtype=torch.int32) % spec.vocab_size
    starts = [LENGTH - length if length < LENGTH else 0 for length in lengths]
    slots = [row + 1 for row in rows]
    segments = make_segments(starts, lengths, rank.tables, slots, 4)
    with counted(monkeypatch) as held:
        drain(rank.decoder.hidden(tokens, segments, rank.caches))
    found = step_bytes(sketch_of(family, sum(lengths), len(lengths)))
    most = 3 if starts == [0] else 20  # with earlier tokens latents might all be expanded
    assert held.peak <= found <= most * held.peak, f"{found / held.peak:.2f} times what is held"


def test_the_kernels_sizes_are_those_that_are_counted_with() -> None:
    """They are counted where triton need not be there."""
    assert activations.SHORT == triton_latent.SHORT
    assert activations.EXPANDED == triton_mla.MOST_BYTES == flashinfer_attention.MOST_BYTES
    assert activations.CHUNK == triton_delta_chunk.CHUNK


SKETCHES = st.builds(
    sketch_of, st.sampled_from(layouts.FAMILIES), st.integers(1, 4096), st.integers(1, 64), st.integers(2, 4096)
)


@given(SKETCHES, st.integers(1, 4096))
def test_more_tokens_need_more_and_what_is_recorded_less(sketch: Sketch, more: int) -> None:
    larger = replace(sketch, tokens=sketch.tokens + more)
    assert 0 < step_bytes(sketch) < step_bytes(larger)
    assert recorded_bytes(sketch, sketch.tokens) <= step_bytes(sketch)


@pytest.mark.parametrize("family", layouts.FAMILIES)
@pytest.mark.parametrize(("tp", "dp", "ep", "travels"), [(2, 1, 1, False), (4, 2, 2, False), (4, 4, 4, True)])
def test_ranks_share_what_is_cut_and_see_the_tokens_of_all(
    family: str, tp: int, dp: int, ep: int, travels: bool
) -> None:
    ranks = MeshConfig("cuda", tp=tp, dp=dp, ep=ep, dense_tp=tp, all_to_all=travels)
    alone, cut = (step_bytes(sketch_of(family, 512, 8, ranks=r)) for r in (MeshConfig("cuda"), ranks))
    assert cut < dp * alone * (3 if travels else 1.01)
    assert cut > alone / tp


@pytest.mark.parametrize("wide", [None, *PARTS])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe_text", "deepseek_v3"])
def test_experts_hold_no_more(family: str, wide: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone: in a step of a tiny model other parts hold more. Grouped products of seven rows a token. `wide`: in
    bfloat16, with what of sums is kept in fp32."""
    chosen = {"num_experts_per_tok": 7, "n_group": 1, "topk_group": 1}
    spec = read_spec({**layouts.random_config(family, 0), **chosen})
    source = Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, 0)
    dtype, kept = (torch.bfloat16, PARTS[wide]) if wide else (torch.float32, NOTHING)
    rank = make_rank(spec, source, dtype, backend=backend("triton"), wide=kept)
    at, moe = next((i, layer.mlp) for i, layer in enumerate(rank.decoder.layers) if isinstance(layer.mlp, MoE))
    monkeypatch.setattr(triton_moe, "pays", lambda *sizes: False)
    x = torch.randn(64, spec.hidden).to(dtype)
    batch = Batch(None, {}, None, (len(x),), len(x))  # type: ignore[arg-type]
    with counted(monkeypatch) as held:
        drain(moe(x, batch))
    changes = {"kernels": replace(TRITON, wide=kept), "dtype": "bfloat16" if wide else "float32"}
    sketch = sketch_of(family, len(x), len(x), spec=spec, **changes)
    shapes = activations._under(sketch.shapes(), f"layers.{at}.mlp.")
    found = activations._experts(activations._Step(sketch, len(x), len(x), len(x), 0), shapes, spec.layers[at].mlp)
    assert held.peak <= found <= 2 * held.peak, f"{found / held.peak:.2f} times what is held"


def test_shapes_are_asked_for_once_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known fault: those of sixty layers for sixteen ranks took a second at each start."""
    sketch, seen = sketch_of("qwen3_moe", tokens=8, rows=2), []
    spec = replace(sketch.spec, layers=sketch.spec.layers * 20)

    def shapes(self: Sketch, rank: int = 0) -> dict[str, tuple[int, ...]]:
        seen.append(len(self.spec.layers))
        return plain(self, rank)

    plain = Sketch.shapes
    monkeypatch.setattr(Sketch, "shapes", shapes)
    assert step_bytes(replace(sketch, spec=spec)) == step_bytes(sketch)
    assert seen == [len(set(spec.layers))] * 2
