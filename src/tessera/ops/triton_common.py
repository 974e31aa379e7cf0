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

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


def settle(functions: Iterable[object]) -> None:
    """Hashes kernels, what they call first.

    Triton 3.6 hashes a kernel with the constants of what it calls, or without, as that was hashed before or was not: so
    the cache knew a kernel by other keys where kernels were first launched in another order.
    """
    settled: set[int] = set()

    def visit(function: object) -> None:
        if not isinstance(function, triton.JITFunction) or id(function) in settled:
            return
        settled.add(id(function))
        for name in function.fn.__code__.co_names:
            visit(function.fn.__globals__.get(name))
        assert function.cache_key

    for function in functions:
        visit(function)


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in fp32 (acc None: 0). fp32 operands are multiplied as such, not as tf32.

    The interpreter multiplies the bit patterns of bf16, so there the operands are widened first; and it takes shapes
    for which Triton has no product on a device, so there they are checked.
    """
    if INTERPRETED:
        assert a.shape[1] >= (32 if a.dtype.primitive_bitwidth == 8 else 16), "too few columns for tensor cores"
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def follow():
    """Waits until all that was launched before has been done, then lets what comes next start and load its weights."""
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@dataclass(frozen=True, slots=True)
class Chip:
    """What launches are cut for: CUDA's compute capability, and multiprocessors."""

    capability: tuple[int, int] = (0, 0)
    processors: int = 8  # in the interpreter: a few, so that grids split


CHIPS: dict[torch.device, Chip] = {}  # those that were asked for, or that a device without memory stands for


def chip_of(device: torch.device) -> Chip:
    """The chip of a device."""
    if device not in CHIPS:
        CHIPS[device] = _measured(device)
    return CHIPS[device]


def _measured(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip()
    properties = torch.cuda.get_device_properties(device)
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """What a kernel that calls `follow` is launched with."""
    return {"launch_pdl": True} if chip_of(device).capability >= (9, 0) else {}


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device: what a grid should keep busy."""
    return chip_of(device).processors
