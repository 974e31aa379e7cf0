"""Speed of the experts' kernels on a CUDA device: `python bench/kernels_moe.py [--json] [--tokens 1 64 ...]`.

Random weights, experts chosen at random; the limit counts the bytes of the experts touched and the rows' operations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch
from gpu_timing import Ceilings, Row, ceilings, graph_us

from tessera.ops.triton_moe import experts
from tessera.ops.triton_route import route

SHAPES = {  # experts, hidden, intermediate, chosen
    "dsv2lite": (64, 2048, 1408, 6),
    "dsv2lite/4": (64, 2048, 352, 6),
    "qwen3next": (512, 2048, 512, 10),
}
TOKENS = (1, 2, 4, 8, 16, 64, 128, 512, 2048, 8192, 16384)
VARIANTS = 6  # batches in turn


def moe_rows(name: str, tokens: tuple[int, ...], top: Ceilings) -> Iterator[Row]:
    """Router and experts of one shape, for each number of tokens."""
    num, hidden, inner, top_k = SHAPES[name]
    new = {"device": "cuda", "dtype": torch.bfloat16}
    w13, w2 = torch.randn(num, 2 * inner, hidden, **new), torch.randn(num, hidden, inner, **new)
    w13 *= hidden**-0.5
    w2 *= inner**-0.5
    for count in tokens:
        logits = [torch.randn(count, num, **new) for _ in range(VARIANTS)]
        yield Row.of("route", f"{name} T={count}", graph_us([lambda a=a: route(a, top_k) for a in logits]), 0, 0, top)
        calls, touched = [], 0.0
        for a in logits:
            x, (ids, weights) = torch.randn(count, hidden, **new), route(a, top_k)
            calls.append(lambda x=x, ids=ids, weights=weights: experts(x, w13, w2, ids, weights))
            touched += len(ids.unique()) / VARIANTS
        num_bytes = touched * 3 * hidden * inner * 2 + 2 * count * hidden * 2
        flops = 6 * count * top_k * hidden * inner
        case = f"{name} T={count} touched {touched:.0f}"
        yield Row.of("experts", case, graph_us(calls), num_bytes, flops, top)


def main() -> None:
    """Prints a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    asked = parser.parse_args()
    top = ceilings()
    print(json.dumps({"device": top.device, "bandwidth": top.bandwidth, "flops": top.flops}) if asked.json else top)
    for name in asked.shapes:
        for row in moe_rows(name, tuple(asked.tokens), top):
            print(json.dumps(row.as_dict()) if asked.json else row, flush=True)


if __name__ == "__main__":
    main()
