"""The delta net's kernels against the plain twin, over slots where everything unused is NaN; outputs are poisoned.

What the batch is, is known on the device alone, as in a replayed graph. Without a CUDA device they run in Triton's
interpreter, which cuts a float32 off where it makes a bfloat16 of it. Tiny heads get three times the tolerance in
bfloat16: the gated norm magnifies what was lost before it (the plain twin in bfloat16 is 0.0125 off).
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import pytest
import torch

from ops.cases import TOLERANCE, Case, case, for_a_graph
from tessera.ops import delta, fused, triton_delta, triton_delta_one, triton_delta_step
from tessera.ops.fused import DeltaInputs
from tessera.ops.triton_delta_one import Cut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")
plain = fused.delta_net_of(delta.causal_conv, delta.gated_delta_rule)
definition = fused.delta_net_of(delta.causal_conv_reference, delta.gated_delta_rule_reference)

RANGES = {
    "mixed": [(0, 70), (7, 3), (0, 1), (4, 9)],
    "decodes": [(n, 1) for n in (0, 1, 15)],
    "verify": [(0, 4), (61, 2)],
}
SMALL = [(2, 2, 16, 16), (1, 3, 8, 24)]
REAL = {"qwen3next": (16, 32, 128, 128), "a quarter": (4, 8, 128, 128), "abacus": (2, 4, 64, 64)}
LARGE = {
    "chunk and decodes": [(0, 2048), *((n, 1) for n in range(300, 330))],
    "chunks": [(0, 700), (64, 512), (5, 65), (0, 9), (9, 1)],
    "decodes": [(n + 1, 1) for n in range(64)],
    "verify": [(n, 1 + n % 8) for n in range(40)],
}


def _inputs(heads: tuple[int, int, int, int], kernel: int, dtype: torch.dtype) -> tuple[DeltaInputs, int]:
    """Parameters, and the width of y: something else, q | k | v, z, b, a."""
    num_k, num_v, key_dim, value_dim = heads
    sizes = (5, 2 * num_k * key_dim + num_v * value_dim, num_v * value_dim, num_v, num_v)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    sections = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    keys = num_k * key_dim
    channels = slice(0, keys), slice(keys, 2 * keys), slice(2 * keys, sizes[1])
    inputs = DeltaInputs(
        *sections[1:], channels, num_k, num_v,
        conv=torch.randn(sizes[1], kernel).to(dtype), decay=-torch.rand(num_v) * 16, dt_bias=torch.randn(num_v) - 3,
        norm=(torch.rand(value_dim) + 0.5).to(dtype), eps=1e-6,
    )  # fmt: skip
    return inputs, ends[-1]


def _on(inputs: DeltaInputs, device: str) -> DeltaInputs:
    own = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return DeltaInputs(**{n: f.to(device) if isinstance(f, torch.Tensor) else f for n, f in own.items()})


def _slots(c: Case, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    state = torch.randn(c.num_slots, *shape).to(dtype)
    state[c.segments.slots[torch.from_numpy(c.segments.host_starts == 0)]] = 0
    state[c.unused_slots] = float("nan")
    state[0] = 0  # scratch: padding reads and writes it
    return state


def _close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, small: bool = False) -> None:
    limit = TOLERANCE[dtype] * (3 if small and dtype == torch.bfloat16 else 1)
    difference = (found.cpu().double() - expected).abs().max().item() / expected.abs().max().item()
    assert difference <= limit, f"{difference:.3g} of the largest apart, allowed {limit:.3g}"


def _check(ranges, heads, form, dtype, state_dtype=torch.float32, kernel=4) -> tuple[torch.Tensor, ...]:
    """Outputs and both states of a padded step, within the tolerance of the narrower dtype. Gives them."""
    c = case(ranges, 16, device=DEVICE)
    here = case(ranges, 16)
    inputs, width = _inputs(heads, kernel, dtype)
    y = torch.randn(here.segments.num_tokens + 4, width).to(dtype)  # of two ranges of padding, and of no range
    conv = _slots(here, (inputs.conv.shape[0], kernel - 1), dtype)
    state = _slots(here, heads[1:], state_dtype)
    wide_conv, wide_state = conv.double(), state.double()
    reference = definition if len(y) < 300 else plain
    expected = reference(y[:-4].double(), inputs, wide_conv, wide_state, here.segments, form)
    conv, state = conv.to(DEVICE), state.to(DEVICE)
    segments = for_a_graph(c.segments, 200, padding=2)
    found = triton_delta.delta_net(y.to(DEVICE), _on(inputs, DEVICE), conv, state, segments, form)
    assert found.dtype == dtype
    assert segments.max_length == 1 or not found[-2:].any(), "tokens of no range"
    used = here.segments.slots.long()
    small = max(heads) < 64
    _close(found[:-4], expected, dtype, small)
    _close(conv.cpu()[used], wide_conv[used], dtype)
    narrow = max(dtype, state_dtype, key=lambda d: torch.finfo(d).eps)
    _close(state.cpu()[used], wide_state[used], narrow, small)
    unused = here.unused_slots[here.unused_slots > 0]
    assert conv[unused].isnan().all()
    assert state[unused].isnan().all()
    return found[:-4], conv[used.to(DEVICE)], state[used.to(DEVICE)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", SMALL, ids=str)
@pytest.mark.parametrize(("ranges", "form"), [("mixed", "chunked"), ("decodes", "recurrent"), ("verify", "recurrent")])
def test_kernels_are_plain(ranges, form, heads, dtype):
    _check(RANGES[ranges], heads, form, dtype)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", SMALL, ids=str)
@pytest.mark.parametrize("cut", [Cut(16, 4, 2), Cut(8, 1, 1), Cut(64, 4, 1)], ids=str)
def test_many_decodes(cut, heads, state_dtype, monkeypatch):
    """A program takes some columns of a state after the others, the last ones of which may not be there."""
    monkeypatch.setattr(triton_delta_step, "num_processors", lambda _: 0)
    monkeypatch.setattr(triton_delta_one, "CUTS", {2: cut, 4: cut})
    _check(RANGES["decodes"], heads, "recurrent", torch.float32, state_dtype)


def test_many_states(monkeypatch):
    """A program then takes all value heads of a key head; and to the bit as where each has its own."""
    case_of = partial(_check, RANGES["verify"], SMALL[1], "recurrent", torch.float32)
    monkeypatch.setattr(triton_delta_step, "num_processors", lambda _: 1000)
    one_each = case_of()
    torch.manual_seed(0)
    monkeypatch.setattr(triton_delta_step, "num_processors", lambda _: 0)
    for one, together in zip(one_each, case_of(), strict=True):
        assert torch.equal(one, together)


def test_other_windows_and_states():
    """A window of one column; a state in bfloat16."""
    _check(RANGES["mixed"], SMALL[0], "chunked", torch.float32, kernel=2)
    _check(RANGES["verify"], SMALL[0], "chunked", torch.float32, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", REAL.values(), ids=REAL)
@pytest.mark.parametrize("ranges", LARGE)
def test_real_sizes(ranges, heads, state_dtype):
    _check(LARGE[ranges], heads, "chunked", torch.bfloat16, state_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("ranges", LARGE)
def test_real_sizes_in_float32(ranges):
    _check(LARGE[ranges], REAL["a quarter"], "chunked", torch.float32)


def test_keys_that_all_look_alike():
    """The same key again and again, nothing forgotten: the hardest inverse; powers of a chunk's matrix explode."""
    heads = (1, 1, 16, 16)
    inputs, width = _inputs(heads, 2, torch.float32)
    inputs.decay.fill_(-1e-4)
    inputs.conv[:] = torch.tensor([0.0, 1.0])
    y = torch.randn(128, width)
    y[:, inputs.mixed.start + 16 : inputs.mixed.start + 32] = torch.rand(16)
    y[:, inputs.b] = 8.0
    c, here = case([(0, 128)], 16, device=DEVICE), case([(0, 128)], 16)
    states = torch.zeros(c.num_slots, 48, 1), torch.zeros(c.num_slots, 1, 16, 16)
    expected = definition(y.double(), inputs, *(s.double() for s in states), here.segments, "chunked")
    states = (s.to(DEVICE) for s in states)
    _close(triton_delta.delta_net(y.to(DEVICE), _on(inputs, DEVICE), *states, c.segments, "chunked"), expected, y.dtype)


@pytest.mark.gpu
def test_replayed_for_other_ranges():
    """A graph recorded for some ranges serves any others of as many tokens; and twice in a row, as layers do."""
    heads = REAL["abacus"]
    steps = [[(0, 70), (3, 1), (0, 9), (7, 2)], [(5, 1), (0, 60), (2, 20), (1, 1)], [(0, 20), (9, 20), (0, 40), (8, 2)]]
    inputs, width = _inputs(heads, 4, torch.bfloat16)
    here = _on(inputs, DEVICE)
    made = [for_a_graph(case(ranges, 16, seed, DEVICE).segments, 20) for seed, ranges in enumerate(steps)]
    fixed = made[0]
    y = torch.randn(fixed.num_tokens, width, device=DEVICE).bfloat16()
    states = [
        torch.randn(8, len(inputs.conv), 3, device=DEVICE).bfloat16(),
        torch.randn(8, *heads[1:], device=DEVICE),
    ]
    start = [s.clone() for s in states]
    triton_delta.delta_net(y, here, *states, fixed, "chunked")
    torch.cuda.synchronize()
    fixed._made.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_delta.delta_net(y, here, *states, fixed, "chunked")
        found = triton_delta.delta_net(y, here, *states, fixed, "chunked")
    for other in reversed(made):
        for name in ("cu_lengths", "starts", "lengths", "slots", "positions", "rows"):
            getattr(fixed, name).copy_(getattr(other, name))
        for now, then in zip(states, start, strict=True):
            now.copy_(then)
        graph.replay()
        expected = [s.clone() for s in start]
        for _ in range(2):
            out = triton_delta.delta_net(y, here, *expected, other, "chunked")
        assert torch.equal(found, out)
        for now, then in zip(states, expected, strict=True):
            assert torch.equal(now, then)
