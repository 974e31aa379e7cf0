"""Gated delta net: fast forms against the token loop, over slots where everything unused is NaN."""

from __future__ import annotations

import pytest
import torch

from ops.cases import RANGES, assert_close, case
from tessera.ops.delta import causal_conv, causal_conv_reference, gated_delta_rule, gated_delta_rule_reference
from tessera.ops.segments import make_segments

HEADS = [(2, 2, 16, 16), (2, 6, 16, 24), (1, 3, 8, 8)]
FORMS = ["recurrent", "chunked"]


def _rule_inputs(num_tokens, heads, dtype):
    num_k, num_v, key_dim, value_dim = heads
    torch.manual_seed(0)
    q, k = (torch.randn(num_tokens, num_k, key_dim).to(dtype) for _ in range(2))
    v = torch.randn(num_tokens, num_v, value_dim).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    g = -torch.rand(num_tokens, num_v, dtype=wide) * torch.tensor([1e-3, 1.0, 40.0])[: min(num_v, 3)].repeat(
        -(-num_v // 3)
    )[:num_v].to(wide)
    return q, k, v, g, torch.rand(num_tokens, num_v, dtype=wide)


def _slots(c, shape, dtype):
    """Slots whose unused ones are NaN; a range that starts at 0 finds zeros."""
    state = torch.randn(c.num_slots, *shape).to(dtype)
    state[c.segments.slots[torch.from_numpy(c.segments.host_starts == 0)]] = 0
    state[c.unused_slots] = float("nan")
    return state


def _same_slots(found, expected, c, dtype):
    used = c.segments.slots.long()
    assert_close(found[used], expected[used], dtype)
    assert found[c.unused_slots].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("ranges", ["mixed", "decodes", "verify", "one"])
def test_fast_rule_is_plain(ranges, heads, form, dtype):
    c = case(RANGES[ranges], 16)
    inputs = _rule_inputs(c.segments.num_tokens, heads, dtype)
    state = _slots(c, heads[1:], torch.promote_types(dtype, torch.float32))
    plain, fast = state.double(), state.clone()
    expected = gated_delta_rule_reference(*(x.double() for x in inputs), plain, c.segments)
    found = gated_delta_rule(*inputs, fast, c.segments, form)
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    _same_slots(fast, plain, c, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("ranges", ["mixed", "decodes", "verify", "one"])
def test_fast_conv_is_plain(ranges, kernel, dtype):
    torch.manual_seed(0)
    c = case([*RANGES[ranges], (9, 2), (0, 2)], 16)
    x, weight = torch.randn(c.segments.num_tokens, 10).to(dtype), torch.randn(10, kernel).to(dtype)
    state = _slots(c, (10, kernel - 1), dtype)
    plain, fast = state.double(), state.clone()
    expected = causal_conv_reference(x.double(), weight.double(), plain, c.segments)
    assert_close(causal_conv(x, weight, fast, c.segments), expected, dtype)
    _same_slots(fast, plain, c, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_then_decodes_are_one_shot(form):
    """A sequence in ranges of any size gives the outputs and the state of one range (float64)."""
    heads, length = (2, 4, 8, 8), 150
    q, k, v, g, beta = _rule_inputs(length, heads, torch.float64)
    x, weight = v.flatten(1), torch.randn(32, 4, dtype=torch.float64)
    whole = make_segments([0], [length], [[1]], [1], 256)
    conv, state = torch.zeros(2, 32, 3, dtype=torch.float64), torch.zeros(2, *heads[1:], dtype=torch.float64)
    expected = gated_delta_rule_reference(q, k, v, g, beta, state, whole)
    expected_conv = causal_conv_reference(x, weight, conv, whole)
    state_now, conv_now, start = torch.zeros_like(state), torch.zeros_like(conv), 0
    for size in (64, 3, 1, 1, 80, 1):
        part, t = make_segments([start], [size], [[1]], [1], 256), slice(start, start + size)
        found = gated_delta_rule(q[t], k[t], v[t], g[t], beta[t], state_now, part, form)
        assert_close(found, expected[t])
        assert_close(causal_conv(x[t], weight, conv_now, part), expected_conv[t])
        start += size
    assert_close(state_now, state)
    assert_close(conv_now, conv)


def test_state_may_be_wider_than_the_inputs():
    c = case(RANGES["mixed"], 16)
    inputs = _rule_inputs(c.segments.num_tokens, HEADS[0], torch.bfloat16)
    state = _slots(c, HEADS[0][1:], torch.float64)
    assert gated_delta_rule(*inputs, state, c.segments, "chunked").dtype == torch.bfloat16
    assert state.dtype == torch.float64
