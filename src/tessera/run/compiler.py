"""The process that compiles kernels ahead: `python -m tessera.run.compiler JOB`, started by `run/ahead.py`.

It finds what the steps of a model launch (`run/foreseen.py`) and has it compiled by as many processes as there are
cores, in the order in which it will be wanted. It uses no device. For one cache only one at a time does so, whoever
started it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from tessera.core.config.types import KernelConfig
from tessera.models.folder import read_model
from tessera.ops.backend import chosen
from tessera.ops.compiling import Compilers, Result, finding
from tessera.ops.triton_common import CHIPS, Chip
from tessera.run.ahead import Job
from tessera.run.children import die_with
from tessera.run.foreseen import NOWHERE, Dry, foreseen
from tessera.run.hardware import cores

LIMIT_S = 600.0  # for others that compile, and then for all kernels
MOST = 32  # processes
NICE = 10  # behind the engine, which loads weights meanwhile
LOOK_S = 0.1
LIBRARIES = ("flashinfer", "grouped_mm", "deep_gemm")
FORM = "[%(asctime)s] %(levelname)s: %(message)s"
log = logging.getLogger("tessera.run.compiler")


def compile_all(job: Job) -> Result:
    """Compiles what the job's steps launch. Steps that cannot be foreseen are left out, and told."""
    spec, config = read_model(Path(job.folder)), replace(job.config, kernels=ours(job.config.kernels))
    backend = chosen(config.kernels)
    begin = partial(die_with, os.getpid())
    compilers = Compilers(job.capability, min(max(cores() - 1, 1), MOST), begin, job.launchers)
    CHIPS[NOWHERE] = Chip(job.capability, job.processors)
    with finding(compilers.add):
        dry, left_out = Dry(config, spec, backend), ""
        for step in foreseen(config):
            try:
                dry.run(step)
            except Exception as error:  # one step's fault takes nothing from the others
                left_out = left_out or f"{step}"[:80] + f": {type(error).__name__}: {error}"
    if left_out:
        log.info("kernels of some steps are compiled when they are met, because those cannot be run dry: %s", left_out)
    return compilers.finish(LIMIT_S)


def ours(kernels: KernelConfig) -> KernelConfig:
    """Triton's in the place of libraries, which need a device; steps of other sizes take ours."""
    names = {name: getattr(kernels, name) for name in ("attention", "moe", "fp8")}
    return replace(kernels, **{name: "triton" if named in LIBRARIES else named for name, named in names.items()})


@contextmanager
def only_one(lock: Path) -> Iterator[bool]:
    """Inside, nobody else holds the lock; False when it cannot be had in time."""
    until = time.monotonic() + LIMIT_S
    with lock.open("w") as file:
        while not (held := _held(file.fileno())) and time.monotonic() < until:
            time.sleep(LOOK_S)
        yield held


def _held(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run(job: Job) -> int:
    """Compiles, tells, and marks that it was done; the exit code."""
    try:
        return marked(job)
    except OSError as error:  # Triton may read a cache that it cannot write
        log.warning("no kernels are compiled ahead: Triton's cache cannot be written (%s)", error)
        return 1


def marked(job: Job) -> int:
    """See `run`. Raises `OSError` where the cache takes no lock or no mark."""
    mark, began = Path(job.mark), time.perf_counter()
    mark.parent.mkdir(parents=True, exist_ok=True)
    with only_one(mark.parent / "tessera.lock") as alone:
        if not alone or mark.exists():
            return 0
        try:
            result = compile_all(job)
        except Exception:  # a fault of ours: kernels are compiled when they are met
            log.exception("kernels cannot be compiled ahead")
            result = Result(0, 0, 0, ("see above",))
        seconds = time.perf_counter() - began
        log.info("%d kernels compiled ahead in %.1f s; %d were there", result.new, seconds, result.there)
        if result.late:
            why = f"it took longer than {LIMIT_S:g} s, or a process that compiled was killed"
            log.warning("%d kernels are not compiled yet, the next start goes on: %s", result.late, why)
        else:
            mark.touch()  # what failed would fail again, and every start would wait for it
        if result.failed:
            why = "; ".join(dict.fromkeys(result.failed))
            log.warning("%d kernels could not be compiled ahead: %s", len(result.failed), why)
    return int(bool(result.late or result.failed))


def main(argv: list[str]) -> int:
    """The process."""
    job = msgspec.json.decode(argv[0], type=Job)
    die_with(job.parent)
    os.nice(NICE)
    torch.set_num_threads(1)
    logging.basicConfig(format=FORM, datefmt="%Y-%m-%d %H:%M:%S")
    log.setLevel(job.config.logging.level.upper())
    return run(job)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)
