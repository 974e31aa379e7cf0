"""Kernels are compiled while the weights are read, by a process beside the engine (`run/compiler.py`).

A chip that meets a model for the first time needs a hundred kernels, of a second each; met one by one, they would stall
whoever asks first. What was compiled for a configuration is marked in Triton's cache, so that the next start asks for
nothing and waits for nothing. Whatever goes wrong here, kernels are compiled when they are met.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

import tessera
from tessera.core.config.types import Config
from tessera.core.spec import ModelSpec
from tessera.run.children import Children

COMMAND = (sys.executable, "-P", "-m", "tessera.run.compiler")
SOURCES = ("comm", "core", "models", "ops", "run")  # what decides which kernels are launched
log = logging.getLogger(__name__)


class Job(msgspec.Struct, frozen=True):
    """What is compiled: for the model in `folder`, run on a chip of CUDA's `capability` with so many `processors`.

    `mark`: a file in Triton's cache that says that all of it is there. `parent`: the process that wants it.
    `launchers`: what launches kernels too, where Triton makes that for each signature.
    """

    parent: int
    folder: str
    config: Config
    capability: tuple[int, int]
    processors: int
    mark: str
    launchers: bool = True


class Ahead:
    """A process that compiles; it goes on while the engine serves, and ends with it."""

    def __init__(self, job: Job) -> None:
        self._until = time.monotonic() + job.config.kernels.ahead
        self._patience = job.config.kernels.ahead
        self._children = Children([[*COMMAND, msgspec.json.encode(job).decode()]], [[]])

    def wait(self) -> None:
        """Until all is compiled, at most until the seconds since its start are over that the configuration gives."""
        self._children.wait(max(self._until - time.monotonic(), 0))
        if not self._children.ended():
            log.info("kernels are still being compiled after %g s; the engine starts without", self._patience)

    def close(self) -> None:
        """Ends it."""
        self._children.close()


def start(folder: Path, spec: ModelSpec, config: Config) -> Ahead | None:
    """Begins to compile what the configuration will launch; None: there is nothing to compile, or it was done."""
    if config.kernels.ahead == 0 or config.mesh.device != "cuda":
        return None
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    properties = torch.cuda.get_device_properties(config.mesh.devices[0])
    capability, processors = (properties.major, properties.minor), properties.multi_processor_count
    mark = Path(knobs.cache.dir) / f"tessera-{digest(spec, config, capability, processors)}"
    try:
        return None if mark.exists() else Ahead(job(folder, config, capability, processors, mark))
    except OSError as error:
        log.warning("no kernels are compiled ahead: %s", error)
        return None


def job(folder: Path, config: Config, capability: tuple[int, int], processors: int, mark: Path) -> Job:
    """What a process is told, on its command line, which others may read."""
    told = replace(config, serving=replace(config.serving, api_key=None))
    return Job(os.getpid(), str(folder), told, capability, processors, str(mark))


def digest(spec: ModelSpec, config: Config, capability: tuple[int, int], processors: int) -> str:
    """What says whether the kernels of one start are those of another: all that they follow from."""
    memory, kernels = config.memory, replace(config.kernels, ahead=0.0)
    shown = (
        (spec, config.model.dtype, config.model.context_length, config.model.quantization, config.mesh.mesh),
        (kernels, config.scheduling, memory.page_size, memory.dtypes),
        (capability, processors, torch.__version__),
    )
    found = hashlib.sha256(repr(shown).encode())
    package = Path(tessera.__file__).parent
    for path in sorted(path for room in SOURCES for path in (package / room).rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:32]
