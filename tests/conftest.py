"""What every test gets: one thread, fixed seeds, hypothesis profiles, and a look at what it leaves running."""

from __future__ import annotations

import os
import random
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

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, print_blob=True, max_examples=100
)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
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


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """A test that leaves a thread or a child process behind fails. Fixtures of a wider scope may keep theirs."""
    threads, children = _threads(), _children()
    yield
    deadline = time.monotonic() + 3
    while (left := _names(_threads() - threads, _children() - children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        pytest.fail("left running: " + ", ".join(left), pytrace=False)


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not t.name.startswith(LASTING_THREADS)}


def _children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def _names(threads: set[threading.Thread], children: set[int]) -> list[str]:
    commands = {pid: _command(pid) for pid in children}
    return [
        *(f"thread {t.name}" for t in threads),
        *(f"process {pid} ({c})" for pid, c in commands.items() if c and not any(n in c for n in LASTING_PROCESSES)),
    ]


def _command(pid: int) -> str:
    """The command line; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
