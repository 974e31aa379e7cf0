"""From timings to figures, under the names of SGLang's `bench_serving`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tessera.bench.serving import Drive, Timing

Figures = dict[str, float | int | None]
KINDS = {
    "ttft": "time to first token",
    "tpot": "time per token after the first",
    "itl": "inter-token",
    "e2e_latency": "end to end",
}
PERCENTILES = (90, 95, 99)


def figures(run: Drive) -> Figures:
    """Counts, rates (a second) and latencies (ms). Requests that failed count in `failed` alone.

    ttft, itl and e2e_latency are over requests, tokens and requests; tpot is (latency - ttft) / (tokens - 1) of each
    request. A latency that nothing was measured of is None.
    """
    good = [t for t in run.timings if t.error is None]
    inputs, outputs = sum(t.num_prompt for t in good), sum(t.num_tokens for t in good)
    waits = {
        "ttft": [t.first for t in good if t.num_tokens],
        "tpot": [(t.whole - t.first) / (t.num_tokens - 1) for t in good if t.num_tokens > 1],
        "itl": [gap for t in good for gap in t.gaps],
        "e2e_latency": [t.whole for t in good],
    }
    found: Figures = {
        "duration": run.seconds,
        "completed": len(good),
        "failed": len(run.timings) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / run.seconds,
        "input_throughput": inputs / run.seconds,
        "output_throughput": outputs / run.seconds,
        "total_throughput": (inputs + outputs) / run.seconds,
        "concurrency": sum(waits["e2e_latency"]) / run.seconds,
    }
    for name, seconds in waits.items():
        found |= _spread(name, seconds)
    return found


def _spread(name: str, seconds: Sequence[float]) -> Figures:
    def told(value: float) -> float | None:
        return 1e3 * float(value) if seconds else None

    values = np.asarray(seconds or [0.0])
    spread: Figures = {
        f"mean_{name}_ms": told(values.mean()),
        f"median_{name}_ms": told(np.median(values)),
        f"std_{name}_ms": told(values.std()),
        f"max_{name}_ms": told(values.max()),
    }
    return spread | {f"p{p}_{name}_ms": told(np.percentile(values, p)) for p in PERCENTILES}


def details(timings: Sequence[Timing]) -> dict[str, list[object]]:
    """Every request, under SGLang's names; seconds."""
    return {
        "input_lens": [t.num_prompt for t in timings],
        "output_lens": [t.num_tokens for t in timings],
        "ttfts": [t.first for t in timings],
        "itls": [t.gaps for t in timings],
        "generated_texts": [t.text for t in timings],
        "errors": [t.error or "" for t in timings],
    }
