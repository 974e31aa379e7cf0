"""Promise: weights that are quantised while they are loaded are the same whatever part of a tensor is asked for."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.quantization import Quantization
from tessera.models import quantizing
from tessera.models.noise import Noise
from tessera.models.quantizing import Quantizing
from tessera.ops.fp8 import dequantize, quantize_weight

NAME, OTHER = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate.weight"


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    slab=st.integers(1, 4000),
    data=st.data(),
)
def test_any_box_is_a_cut_of_the_whole(
    shape: tuple[int, int], block: tuple[int, int], slab: int, data: st.DataObject
) -> None:
    spans = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        spans.append((start, data.draw(st.integers(1, size - start))))
    noise = Noise({NAME: shape, OTHER: shape}, zero_centred=False)
    whole = torch.empty(shape)
    noise.copy(NAME, (0, shape[0]), (0, shape[1]), whole)
    values, scales = quantize_weight(whole, block)
    rows, columns = (slice(start, start + length) for start, length in spans)
    touched = [slice(start // b, -(-(start + n) // b)) for (start, n), b in zip(spans, block, strict=True)]
    source, size = Quantizing(noise, Quantization(block, loading=True)), (spans[0][1], spans[1][1])
    with patch.object(quantizing, "BLOCK_BYTES", slab):
        out, plain, other = torch.empty(size, dtype=torch.float8_e4m3fn), torch.empty(size), torch.empty(size)
        found = source.fp8(NAME, *spans, out)
        source.copy(NAME, *spans, plain)
        source.copy(OTHER, *spans, other)
    assert torch.equal(out.view(torch.uint8), values[rows, columns].contiguous().view(torch.uint8))
    assert torch.equal(found, scales[touched[0], touched[1]])
    assert torch.equal(plain, dequantize(values, scales, block)[rows, columns])
    expected = torch.empty(size)
    noise.copy(OTHER, *spans, expected)
    assert torch.equal(other, expected)


def test_a_block_keeps_its_largest_number_and_three_bits_of_the_others() -> None:
    weight = torch.randn(70, 50) * torch.logspace(-3, 2, 70)[:, None]
    weight[:16, :16] = 0
    values, scales = quantize_weight(weight, (16, 16))
    again = dequantize(values, scales, (16, 16))
    assert (values.shape, scales.shape) == ((70, 50), (5, 4))
    assert not again[:16, :16].any()
    grid = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)[:70, :50]
    assert ((again - weight).abs() <= torch.maximum(weight.abs() / 16, grid * 2**-9) * 1.001).all()
    largest = weight.abs() == grid * 448
    assert largest.sum() >= 15
