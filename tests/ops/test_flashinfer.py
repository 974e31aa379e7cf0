"""FlashInfer behind our entries, against the plain twins: on CPU with wrappers that keep its contract without its
kernels, on a GPU with the library itself."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.test_config import HYBRID, spec_of
from ops.cases import BATCHES, assert_close, case, ends, for_a_graph, paged
from ops.fake_flashinfer import Paged, library
from tessera.core.spec import MLASpec, RopeSpec
from tessera.ops.attention import paged_attention_reference
from tessera.ops.backend import REFERENCE, backend
from tessera.ops.flashinfer_attention import MOST_BYTES, SHORT, FlashInfer
from tessera.ops.flashinfer_plans import Turns, ranges_of
from tessera.ops.mla import mla_absorbed_reference, mla_expanded_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [(0, 30), (33, 20), (7, SHORT + 1), (7, SHORT), (0, 1), (40, 1), (15, 1), (16, 1)]
RANGES = {"mixed": MIXED, "decodes": [(n, 1) for n in (0, 15, 16, 100)], "long": [(0, 30), (5, 9), (90, 70)]}
SCALE = 0.3
fake = pytest.mark.skipif(DEVICE == "cuda", reason="there it is tested with the library itself")


def _refusing(name: str):
    def refuse(*_: object) -> None:
        raise AssertionError(f"{name} ran on the kernels beside FlashInfer's")

    return refuse


ALONE = replace(REFERENCE, **{op: _refusing(op) for op in ("paged_attention", "mla_absorbed", "mla_expanded")})


def _fake(rest=ALONE, hopper=True) -> FlashInfer:
    return FlashInfer(library(), rest, hopper, lambda: lambda: True)


def _paged(ranges, page_size, heads, dtype, kv=None):
    num_q, num_kv, dim = heads
    c, kv = case(ranges, page_size, device=DEVICE), kv or dtype
    pool = paged(c, 2, num_kv, tokens=[torch.randn(end, 2, num_kv, dim, device=DEVICE).to(kv) for end in ends(c)])
    return c.segments, torch.randn(c.segments.num_tokens, num_q, dim, device=DEVICE).to(dtype), pool


def _latent(ranges, page_size, heads, dtype, nope=128, value=128):
    c = case(ranges, page_size, device=DEVICE)
    pool = paged(c, tokens=[torch.randn(end, 576, device=DEVICE).to(dtype) for end in ends(c)])
    q_nope, q_rope = (torch.randn(c.segments.num_tokens, heads, n, device=DEVICE).to(dtype) for n in (nope, 64))
    kv_b = (torch.randn(heads, nope + value, 512, device=DEVICE) * 512**-0.5).to(dtype)
    return c.segments, pool, q_nope, q_rope, kv_b


def _latents_are_plain(ops, segments, pool, q_nope, q_rope, kv_b, scale=0.07) -> None:
    """Both forms, against the plain ones in fp64 on the same values."""
    wide = [x.double() for x in (q_nope, q_rope, kv_b, pool)]
    for form, plain in ((ops.mla_expanded, mla_expanded_reference), (ops.mla_absorbed, mla_absorbed_reference)):
        assert_close(form(q_nope, q_rope, kv_b, pool, segments, scale), plain(*wide, segments, scale))


@fake
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("page_size", [5, 16, 64])
@pytest.mark.parametrize("ranges", RANGES)
def test_attention_is_plain(ranges, page_size, hopper):
    segments, q, pool = _paged(RANGES[ranges], page_size, (4, 2, 64), torch.float16)
    found = _fake(hopper=hopper).paged_attention(q, pool, segments, SCALE)
    assert_close(found, paged_attention_reference(q.double(), pool.double(), segments, SCALE))


@fake
@pytest.mark.parametrize("ranges", RANGES)
def test_latent_attention_is_plain(ranges):
    _latents_are_plain(_fake(), *_latent(RANGES[ranges], 16, 2, torch.float16))


@fake
@settings(max_examples=30, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 24)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 3, 16, 64]),
)
def test_any_batch(ranges, page_size):
    """The pages are those of the sequences, each once and in order; long ranges may lie anywhere."""
    segments, q, pool = _paged(ranges, page_size, (2, 1, 8), torch.float32)
    found = _fake().paged_attention(q, pool, segments, SCALE)
    assert_close(found, paged_attention_reference(q.double(), pool.double(), segments, SCALE))
    r = ranges_of(segments)
    for s, end in enumerate(segments.host_starts + segments.host_lengths):
        own = r.indices[int(r.pages[s]) : int(r.pages[s + 1])]
        assert torch.equal(own, segments.page_table[s, : -(-int(end) // page_size)])


@fake
def test_a_step_is_planned_once_for_all_layers():
    """A mixed step is two launches a layer, a Hopper one of what is long; then wrappers serve the next step."""
    ops, (segments, q, pool) = _fake(), _paged(MIXED, 16, (4, 2, 64), torch.float16)
    for _ in range(3):
        ops.paged_attention(q, pool, segments, SCALE)
    wrappers = [x.wrapper for part in (segments.part(0, 3), segments.part(3, 8))
                for key, x in part._made.items() if key[0] == "flashinfer"]  # fmt: skip
    assert [(w.backend, w.plans) for w in wrappers] == [("fa3", 1), ("fa2", 1)]
    later, q, pool = _paged(MIXED, 16, (4, 2, 64), torch.float16)
    del segments
    ops.paged_attention(q, pool, later, SCALE)
    assert sorted(w.plans for w in wrappers) == [2, 2]


@fake
def test_other_scales_and_heads_are_other_plans():
    ops, (segments, q, pool) = _fake(), _paged(RANGES["long"], 16, (4, 2, 64), torch.float16)
    for rows, scale in ((q, SCALE), (q, 0.1), (q[:, :2], SCALE)):
        found = ops.paged_attention(rows, pool, segments, scale)
        assert_close(found, paged_attention_reference(rows.double(), pool.double(), segments, scale))


class Held:
    """A wrapper for `Turns`."""


def test_a_wrapper_is_a_steps_own_and_its_memory_free_before_it_is_planned_again():
    made, done, plans = [], [], []

    def make():
        made.append(Held())
        return made[-1]

    def mark():
        at = len(done)
        done.append(False)
        return lambda: done[at]

    turns = Turns(make, mark)
    first = turns.take(plans.append)
    assert turns.take(plans.append).wrapper is made[1], "the first is still held"
    del first  # both are free, and the device has copied neither plan
    assert turns.take(plans.append).wrapper is made[2]
    done[:] = [True] * len(done)
    held = [turns.take(plans.append) for _ in range(3)]
    assert {id(planned.wrapper) for planned in held} == {id(wrapper) for wrapper in made}
    assert plans == [*made, *(planned.wrapper for planned in held)]


@fake
def test_what_it_has_no_kernels_for_runs_beside_it():
    """Steps whose lengths the host does not know, latents and heads of other sizes, too many positions."""
    ops = _fake(REFERENCE)
    segments, q, pool = _paged(RANGES["long"], 16, (4, 2, 64), torch.float16)
    unknown = for_a_graph(segments, pages=12)
    beside = _fake(replace(ALONE, paged_attention=lambda *_: "beside", mla_absorbed=lambda *_: "beside"))
    assert beside.paged_attention(q, pool, unknown, SCALE) == "beside"
    for recorded, served in ((len(q), False), (len(q) - 1, True)):
        beside._recorded = recorded  # a step that a graph will hold runs on the same kernels before it does
        assert (beside.paged_attention(q, pool, segments, SCALE) != "beside") is served
    _latents_are_plain(ops, *_latent(RANGES["long"], 16, 2, torch.float16, nope=64, value=64))
    assert not any(key[0] == "BatchPrefillWithRaggedKVCacheWrapper" for key in ops._turns)
    segments, _, q_nope, q_rope, kv_b = _latent([(0, 1)], 16, 2, torch.float16)
    far = replace(segments, host_starts=np.array([MOST_BYTES], np.int32), _made={})
    beside = _fake(replace(ALONE, mla_expanded=lambda *_: "beside"))
    assert beside.mla_expanded(q_nope, q_rope, kv_b, None, far, SCALE) == "beside"


@fake
def test_empty_steps_have_no_plan():
    segments, q, pool = _paged([(0, 3)], 16, (4, 2, 64), torch.float16)
    none = segments.part(0, 0)
    assert _fake(REFERENCE).paged_attention(q[:0], pool, none, SCALE).shape == (0, 4, 64)


def test_all_kernels_of_a_model_are_built_at_start():
    ops, bf16 = _fake(), torch.bfloat16
    ops.compile(spec_of(HYBRID, head_dim=256), bf16, bf16)
    assert sorted(name[:16] for name in ops._library.jit.built) == ["prefill ('fa2', ", "prefill ('fa3', "]
    ops = _fake()
    ops.compile(spec_of(HYBRID, head_dim=256), bf16, torch.float8_e4m3fn)
    assert [name[:16] for name in ops._library.jit.built] == ["prefill ('fa2', "], "Hopper's reads no fp8"
    spec = spec_of(HYBRID)
    mla = MLASpec(16, None, 512, 128, 128, RopeSpec(64, 1e4), 0.1)
    latent = replace(spec, layers=(replace(spec.layers[0], mixer=mla),))
    ops = _fake()
    ops.compile(latent, bf16, bf16)
    assert sorted(name.split()[0] for name in ops._library.jit.built) == ["mla", "prefill"]


def test_the_fake_has_teeth():
    """Pages in another order are another answer."""
    segments, q, pool = _paged([(50, 20)], 16, (2, 1, 8), torch.float32)
    wrapper, r, out = Paged(q, "HND", backend="fa3"), ranges_of(segments), torch.empty_like(q)
    sizes = {"causal": True, "sm_scale": SCALE, "q_data_type": q.dtype, "kv_data_type": q.dtype, "seq_lens": r.keys}
    wrapper.plan(r.queries, r.pages, r.indices.flip(0), r.last, 2, 1, 8, 16, max_token_per_sequence=20, **sizes)
    wrapper.run(q, pool.nan_to_num(), out=out)
    with pytest.raises(AssertionError, match="apart"):
        assert_close(out, paged_attention_reference(q.double(), pool.double(), segments, SCALE), torch.float32)


REAL = [(32, 8, 128), (16, 2, 256), (16, 16, 64), (4, 2, 64)]
needs_library = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed")


@pytest.fixture(scope="module")
def ops():
    """FlashInfer's kernels, where nothing runs beside them."""
    found = backend("flashinfer")
    attention = found.paged_attention.__self__
    attention._rest = ALONE
    return attention


@pytest.mark.gpu
@needs_library
@pytest.mark.timeout(600)  # kernels are compiled when they are met first
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("heads", REAL, ids=[f"dim{dim} {num}" for num, _, dim in REAL])
@pytest.mark.parametrize("ranges", BATCHES)
def test_real_attention(ops, ranges, heads, page_size):
    segments, q, pool = _paged(BATCHES[ranges], page_size, heads, torch.bfloat16)
    scale = heads[2] ** -0.5
    expected = paged_attention_reference(q.double(), pool.double(), segments, scale)
    assert_close(ops.paged_attention(q, pool, segments, scale), expected)


@pytest.mark.gpu
@needs_library
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranges", BATCHES)
def test_keys_in_fp8(ops, ranges):
    segments, q, pool = _paged(BATCHES[ranges], 64, REAL[0], torch.bfloat16, torch.float8_e4m3fn)
    expected = paged_attention_reference(q.double(), pool.double(), segments, SCALE)
    assert_close(ops.paged_attention(q, pool, segments, SCALE), expected)


@pytest.mark.gpu
@needs_library
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("heads", "page_size"), [(16, 16), (16, 64), (128, 64), (4, 64)])
@pytest.mark.parametrize("ranges", BATCHES)
def test_real_latents(ops, ranges, heads, page_size):
    chosen = BATCHES[ranges] if ranges != "decode" else BATCHES["decode"][:7]  # all that 128 heads may expand
    _latents_are_plain(ops, *_latent(chosen, page_size, heads, torch.bfloat16))


@pytest.mark.gpu
@needs_library
@pytest.mark.timeout(600)
def test_steps_in_flight_keep_their_plans(ops):
    """Planned and launched while the device is busy with something long: nobody's plan is written over."""
    steps = [_paged(BATCHES[name], 64, REAL[0], torch.bfloat16) for name in ("decode", "chunks", "mixed", "verify") * 3]
    busy = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for _ in range(200):
        busy = busy @ busy * 1e-2
    for segments, q, pool in steps:
        found.append(ops.paged_attention(q, pool, segments, SCALE))
        segments._made.clear()
    assert not torch.cuda.current_stream().query(), "the device was not busy: nothing was tested"
    for (segments, q, pool), one in zip(steps, found, strict=True):
        assert_close(one, paged_attention_reference(q.double(), pool.double(), segments, SCALE))


@pytest.mark.gpu
@needs_library
@pytest.mark.timeout(600)
def test_planning_waits_for_nothing(ops):
    """Once its kernels are there: neither a plan nor a launch waits for the device."""
    segments, q, pool = _paged(BATCHES["mixed"], 64, REAL[0], torch.bfloat16)
    ops.paged_attention(q, pool, segments, SCALE)
    segments._made.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.paged_attention(q, pool, segments, SCALE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
