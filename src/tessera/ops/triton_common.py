"""What our Triton kernels share.

Without a CUDA device they run in Triton's interpreter: TRITON_INTERPRET=1 must be in the environment before anything
imports triton, tests/conftest.py sees to it. No kernel is tuned at run time: a search in the middle of serving would
stall it, and the interpreter cannot do it; tables of configurations by shape stand beside each kernel.

Wrappers are captured in CUDA graphs and replayed for other batches. So grids follow from shapes and padded counts
alone, what a batch says of itself is read on the device, and a program without work leaves at once.

A kernel may start while the one before it ends (programmatic dependent launch, from Hopper on): launched with
`chained(device)`, every one of its programs calls `follow()` before it reads what a kernel wrote, or writes anything.
Weights may be read before: nobody writes them while steps run.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in fp32 (acc None: 0). fp32 operands are multiplied as such, not as tf32.

    The interpreter multiplies the bit patterns of bf16, so there the operands are widened first.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def follow():
    """Waits until all that was launched before has been done, then lets what comes next start and load its weights."""
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """What a kernel that calls `follow` is launched with."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"launch_pdl": True} if able else {}


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device: what a grid should keep busy. A few in the interpreter, so that grids split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
