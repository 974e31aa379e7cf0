"""What every test gets: one thread, fixed seeds, hypothesis profiles, and a look at what it leaves running."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Set before a test imports numpy or torch (so this file imports neither), and inherited by child processes: tests run
# side by side and start ranks of their own, and the rounding of float32 depends on the number of threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: our kernels then run on CPU

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, print_blob=True, max_examples=100
)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("faults", deadline=None, max_examples=10_000, print_blob=True)  # make test-faults
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device, and those marked `engines` that `-m` does not ask for."""
    if "engines" not in (config.option.markexpr or ""):
        for item in items:
            if item.get_closest_marker("engines"):
                item.add_marker(pytest.mark.skip(reason="make test-engines runs it"))
    for item in items:  # what runs in the interpreter elsewhere is compiled there
        if item.path.name.startswith("test_triton_"):
            item.add_marker("kernels")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch  # slow to import, and most runs do not need it

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same seeds, whatever ran before it."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


# They belong to libraries and live as long as the process.
LASTING_THREADS = ("tqdm_monitor", "QueueManagerThread", "pytest_timeout", "AnyIO worker thread", "hf-")
LASTING_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
PATIENCE_S = 3.0


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """A test that leaves a thread or a child process behind fails. Fixtures of a wider scope may keep theirs.

    A child left behind is killed, so that it does not disturb the tests that follow.
    """
    before = _running()
    yield
    deadline = time.monotonic() + PATIENCE_S
    while (left := _running(without=before)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for kind, number in left:
        if kind == "process":
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    if left:
        what = sorted(f"{kind} {number} ({name})" for (kind, number), name in left.items())
        pytest.fail("left running: " + ", ".join(what), pytrace=False)


Running = dict[tuple[str, int], str]


def _running(without: Running | None = None) -> Running:
    """Threads, child processes, and processes that a fork server started for us."""
    found = {
        ("thread", thread.ident or 0): thread.name
        for thread in threading.enumerate()
        if not thread.name.startswith(LASTING_THREADS)
    }
    for file in Path("/proc/self/task").glob("*/children"):
        for pid in _read(file).split():
            command = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
            ended = _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1] in ("", "Z", "X")
            if not ended and not any(name in command for name in LASTING_PROCESSES):
                found["process", int(pid)] = command
    found |= {("process", child.pid or 0): child.name for child in multiprocessing.active_children()}
    return {key: name for key, name in found.items() if key not in (without or {})}


def _read(file: Path) -> str:
    """The text of a file of /proc; empty when its process has ended."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
