"""What this host offers, measured once, before anything is resolved."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import psutil
import torch

from tessera.core.config.kernels import LIBRARIES
from tessera.core.config.needs import Sketch
from tessera.core.config.types import Hardware
from tessera.core.mesh import share
from tessera.ops.linear import has_bf16

CONTEXT = 600 << 20  # bytes of a device's context, in each process that uses it
MODULES = 768 << 20  # and of what it loads: kernels, workspaces of products on two streams

CGROUP = Path("/sys/fs/cgroup")


def measure(device: str = "auto") -> Hardware:
    """The hardware that `--device` means: "cuda" or "cpu" as asked, "auto": CUDA where there is one."""
    if device != "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(0)
        return Hardware(
            device="cuda",
            memory=free,
            count=torch.cuda.device_count(),
            name=torch.cuda.get_device_name(0),
            capability=torch.cuda.get_device_capability(0),
            libraries=tuple(name for name in LIBRARIES if importlib.util.find_spec(name)),
        )
    return Hardware(device="cpu", memory=free_memory(), name="cpu", bf16=has_bf16())


def device_bytes(sketch: Sketch) -> int:
    """Bytes that CUDA takes after `measure`: this process has its context by then, ranks that are processes do not."""
    if sketch.ranks.device != "cuda":
        return 0
    return MODULES + (CONTEXT if sketch.mesh.size > 1 else 0)


def cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its cgroup rounded up."""
    allowed = len(os.sched_getaffinity(0))
    quota = _cgroup("cpu.max")
    if quota and quota[0] != "max":
        allowed = min(allowed, -(-int(quota[0]) // int(quota[1])))
    return max(allowed, 1)


def share_cores(processes: int) -> None:
    """Torch's threads, for one of as many `processes` of this host. It counts the host's cores; a container may use
    fewer. OMP_NUM_THREADS, which it has read, may be lower still."""
    torch.set_num_threads(max(share(min(torch.get_num_threads(), cores()), processes), 1))


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of RAM that this process can still get: what the host has, or what its cgroup leaves."""
    available = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max", cgroup), _cgroup("memory.current", cgroup)
    if limit and used and limit[0] != "max":
        available = min(available, max(int(limit[0]) - int(used[0]), 0))
    return int(available)


def _cgroup(name: str, cgroup: Path = CGROUP) -> list[str]:
    """Words of a cgroup v2 file; empty where there is none."""
    path = cgroup / name
    return path.read_text().split() if path.is_file() else []
