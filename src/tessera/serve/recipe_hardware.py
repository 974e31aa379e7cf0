"""Hardware by the name that a recipe gives it, to plan for it where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tessera.core.config import Hardware
from tessera.core.config.kernels import LIBRARIES

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory`: bytes that are free on an idle one, about 3 % less than there is; `capability`: of CUDA."""

    memory: int
    capability: tuple[int, int]


# NVIDIA's data sheets: memory (GB as GiB of what CUDA reports), compute capability.
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(78 * GIB, (8, 0)),
    "l40s": Gpu(44 * GIB, (8, 9)),
    "h100": Gpu(78 * GIB, (9, 0)),
    "h200": Gpu(138 * GIB, (9, 0)),
    "b200": Gpu(178 * GIB, (10, 0)),
    "gb200": Gpu(184 * GIB, (10, 0)),
    "gb300": Gpu(276 * GIB, (10, 3)),
}


def assumed(gpu_type: str, count: int) -> Hardware | None:
    """One host with `count` such GPUs; None for a name that is not known."""
    gpu = GPUS.get(gpu_type.lower().replace("-", "").replace("_", ""))
    if gpu is None:
        return None
    name, libraries = f"{gpu_type} (assumed)", tuple(LIBRARIES)
    return Hardware("cuda", gpu.memory, count=count, name=name, capability=gpu.capability, libraries=libraries)
