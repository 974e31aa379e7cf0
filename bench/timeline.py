"""Draws traces of torch's profiler: `python bench/timeline.py OUT.png TRACE.gz ... [--begin MS --length MS]`.

A panel for each trace, with a lane for what the device computed and one for its collectives, coloured where both ran at
once. `bench/overlap.py --trace` makes such traces. Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

WIRE = ("send", "receive")  # kernels of ours that are collectives, beside those of NCCL
COMPUTE, ALONE, BOTH = "compute", "wire, nothing beside it", "wire, under other kernels"
COLOURS = {COMPUTE: "#4c72b0", ALONE: "#c44e52", BOTH: "#55a868"}
Span = tuple[float, float]


def spans(path: Path) -> tuple[list[Span], list[Span]]:
    """(computing, on the wire), in milliseconds since the first of them."""
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") == "kernel"]
    first = min(e["ts"] for e in kernels)
    found: tuple[list[Span], list[Span]] = [], []
    for e in kernels:
        begin = (e["ts"] - first) / 1e3
        found["nccl" in e["name"].lower() or e["name"] in WIRE].append((begin, begin + e["dur"] / 1e3))
    return found


def covered(span: Span, others: list[Span]) -> list[Span]:
    """The parts of a span in which one of the others ran too."""
    return [(max(span[0], a), min(span[1], b)) for a, b in others if a < span[1] and b > span[0]]


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--begin", type=float, default=0.0, help="milliseconds")
    parser.add_argument("--length", type=float, default=30.0, help="milliseconds")
    args = parser.parse_args()
    figure, axes = plt.subplots(len(args.traces), 1, figsize=(14, 1.2 + 1.7 * len(args.traces)), squeeze=False)
    for axis, path in zip(axes[:, 0], args.traces, strict=True):
        computing, wire = spans(path)
        both = [part for span in wire for part in covered(span, computing)]
        lanes = ((1, computing, COMPUTE), (0, wire, ALONE), (0, both, BOTH))
        for lane, parts, label in lanes:
            bars = [(a, b - a) for a, b in parts]
            axis.broken_barh(bars, (lane + 0.1, 0.8), facecolors=COLOURS[label], edgecolors="none", label=label)
        axis.set_xlim(args.begin, args.begin + args.length)
        axis.set_ylim(0, 2)
        axis.set_yticks([0.5, 1.5], ["wire", "compute"])
        axis.set_title(path.name.removesuffix(".gz"), loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("milliseconds of a step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
