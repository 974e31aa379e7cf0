"""Speed of the delta net's kernels on a CUDA device: `python bench/kernels_delta.py [--json]`.

Everything between the two projections of Qwen3-Next's layer (16 key heads, 32 value heads of 128), bf16, states in fp32
and bf16. The limit counts y, outputs and states, read and written once, and the operations of the chunked form.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from gpu_timing import Ceilings, Row, ceilings, graph_us

from tessera.ops.fused import DeltaInputs
from tessera.ops.segments import make_segments
from tessera.ops.triton_delta import delta_net

KEYS, VALUES, DIM, KERNEL = 16, 32, 128, 4
STEPS = {
    "1 decode": [1],
    "64 decodes": [1] * 64,
    "512 decodes": [1] * 512,
    "64 ranges of 4": [4] * 64,
    "one range of 4096": [4096],
    "8 ranges of 2048": [2048] * 8,
    "1024 and 256 decodes": [1024] + [1] * 256,
}
ROTATED_BYTES = 256 << 20  # states of the calls in turn: beyond what the cache holds


def layer() -> tuple[DeltaInputs, int]:
    """Parameters, and the width of y = q | k | v, z, b, a."""
    channels, wide = (2 * KEYS + VALUES) * DIM, VALUES * DIM
    ends = np.cumsum([channels, wide, VALUES, VALUES]).tolist()
    starts = [0, *ends]
    sections = [slice(start, end) for start, end in zip(starts, ends, strict=False)]
    keys = KEYS * DIM
    cut = slice(0, keys), slice(keys, 2 * keys), slice(2 * keys, channels)
    new = {"device": "cuda"}
    inputs = DeltaInputs(
        *sections, cut, KEYS, VALUES,
        conv=torch.randn(channels, KERNEL, **new).bfloat16(), decay=-torch.rand(VALUES, **new) * 16,
        dt_bias=torch.randn(VALUES, **new) - 3, norm=torch.ones(DIM, **new).bfloat16(), eps=1e-6,
    )  # fmt: skip
    return inputs, ends[-1]


def delta_row(name: str, dtype: torch.dtype, top: Ceilings) -> Row:
    """One kind of step."""
    lengths = np.array(STEPS[name], np.int32)
    inputs, width = layer()
    count, total = len(lengths), int(lengths.sum())
    size = torch.empty(0, dtype=dtype).element_size()
    state_bytes = count * VALUES * DIM * DIM * size
    variants = max(1, min(32, -(-ROTATED_BYTES // state_bytes)))
    state = torch.randn(variants * count + 1, VALUES, DIM, DIM, device="cuda").to(dtype)
    conv = torch.randn(variants * count + 1, len(inputs.conv), KERNEL - 1, device="cuda").bfloat16()
    calls, form = [], "chunked" if lengths.max() > 1 else "recurrent"
    for i in range(variants):
        slots = np.arange(count) + 1 + i * count
        segments = make_segments(lengths * 0, lengths, np.zeros((count, 4096), np.int32), slots, 64, "cuda")
        y = torch.randn(total, width, device="cuda").bfloat16()
        calls.append(lambda y=y, segments=segments: delta_net(y, inputs, conv, state, segments, form))
    num_bytes = 2 * state_bytes + total * (width + VALUES * DIM) * 2 + 2 * count * conv[0].nbytes
    flops = total * VALUES * (2 * 64 * 7 * DIM / 2 + 6 * DIM * DIM) if lengths.max() > 8 else 0
    return Row.of("delta_net", f"{name}, state {dtype}".replace("torch.", ""), graph_us(calls), num_bytes, flops, top)


def main() -> None:
    """Prints a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    top = ceilings()
    print(json.dumps({"device": top.device, "bandwidth": top.bandwidth, "flops": top.flops}) if asked.json else top)
    for name in STEPS:
        for dtype in (torch.float32, torch.bfloat16):
            row = delta_row(name, dtype, top)
            print(json.dumps(row.as_dict()) if asked.json else row, flush=True)


if __name__ == "__main__":
    main()
