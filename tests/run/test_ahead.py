"""Promises: what a model will launch is compiled before it is met, once for all that share a cache; a start waits for
it as long as it was told to, and nothing of it outlives the engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from triton import knobs

from run.dry_runs import CASES
from tessera.core.config.types import GraphSizes
from tessera.ops import compiling
from tessera.ops.compiling import Result
from tessera.run import ahead, compiler
from tessera.run.ahead import Ahead, Job, digest
from tessera.run.foreseen import foreseen
from tessera.run.graphs import Size
from tiny import TINY, resolved, tiny_model

MODEL = tiny_model("hybrid")
CONFIG = resolved(MODEL.spec).config
SCRIPT = Path(__file__).with_name("dry_runs.py")


def dry_runs(cache: Path, *what: str) -> Any:
    """What `dry_runs.py` tells, in its last line."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SCRIPT), *what]
    ran = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_steps_of_any_lengths_are_foreseen(name: str, tmp_path: Path) -> None:
    """For all ranks, whatever the others have to do. Known fault: not those of a step that is one DP rank's alone."""
    told = dry_runs(tmp_path, "cover", name)
    assert told["missed"] == []
    assert told["met"] > 30


def test_no_kernel_is_compiled_anew_for_where_columns_begin(tmp_path: Path) -> None:
    """Known fault: columns packed without gaps, of which four begin at 16 bytes or not as the batch will have it."""
    told = dry_runs(tmp_path, "columns")
    assert told["aligned"] < told["anywhere"]


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path: Path) -> None:
    """By a real compilation for sm90: launches find it in the cache, and only it."""
    told = dry_runs(tmp_path, "compiled")
    done = {"late": 0, "failed": []}
    assert told["results"] == [{"new": 1, "there": 0, **done}, {"new": 0, "there": 1, **done}]
    assert told["hits"] == [True, False]


def test_a_kernel_has_one_key_whatever_was_hashed_before(tmp_path: Path) -> None:
    """Triton 3.6 makes another key of a kernel where what it calls has none yet: compiled by another process, which
    met kernels in another order, it would be compiled again."""
    told = dry_runs(tmp_path, "hashed")
    assert told["settled"] == 0 < told["as they come"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(TINY))
def test_an_engine_compiles_nothing_that_was_foreseen(name: str, tmp_path: Path) -> None:
    """On a device, with an empty cache: all that it launches was compiled by others before it was ready."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY[name], "torch_dtype": "bfloat16"}))
    assert dry_runs(tmp_path / "cache", "served", str(tmp_path)) == {"missed": [], "marks": 1}


def job_of(mark: Path, seconds: float = 0.4) -> Job:
    config = replace(CONFIG, kernels=replace(CONFIG.kernels, ahead=seconds))
    return Job(os.getpid(), "folder", config, (9, 0), 132, str(mark))


@pytest.mark.parametrize(("code", "at_least", "at_most"), [("import time; time.sleep(60)", 0.3, 50.0), ("", 0.0, 50.0)])
def test_a_start_waits_no_longer_than_it_may(
    code: str, at_least: float, at_most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "COMMAND", (sys.executable, "-c", code))
    compiling = Ahead(job_of(tmp_path / "mark", 0.4 if code else 60.0))
    began = time.monotonic()
    compiling.wait()
    compiling.close()  # the test fails if the process is still there
    assert at_least <= time.monotonic() - began < at_most


def test_nothing_is_compiled_ahead_without_a_device(tmp_path: Path) -> None:
    for device, seconds in (("cpu", 10.0), ("cuda", 0.0)):
        kernels, mesh = replace(CONFIG.kernels, ahead=seconds), replace(CONFIG.mesh, device=device)
        assert ahead.start(tmp_path, MODEL.spec, replace(CONFIG, kernels=kernels, mesh=mesh)) is None


def test_a_start_goes_on_where_nothing_can_be_compiled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Known fault: no process, and no start."""
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(ahead, "COMMAND", (str(tmp_path / "missing"),))
    chip = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    config = replace(job_of(tmp_path).config, mesh=replace(CONFIG.mesh, device="cuda"))
    assert ahead.start(tmp_path, MODEL.spec, config) is None
    assert "No such file" in caplog.text


def test_a_cache_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert compiler.run(job_of(tmp_path / "file" / "mark")) == 1
    assert "Triton's cache cannot be written" in caplog.text


def test_steps_of_prompts_alone_are_foreseen() -> None:
    """Known fault: up to a chunk only, and twice that is planned while nobody decodes."""
    config = replace(CONFIG, scheduling=replace(CONFIG.scheduling, chunk_size=64, alone_size=128))
    steps = [step for step in foreseen(config) if not isinstance(step, Size)]
    assert max(sum(length for _, length in step) for step in steps) == 128


@pytest.mark.parametrize("chunk", [1, 2, 5, 256, 4096])
@pytest.mark.parametrize("rows", [1, 24])
def test_every_step_that_is_foreseen_has_tokens(chunk: int, rows: int) -> None:
    """Known fault: none of 700 tokens in chunks of 256, so a step of nothing, and nothing was compiled ahead."""
    config = replace(CONFIG, scheduling=replace(CONFIG.scheduling, chunk_size=chunk, alone_size=0, max_running=rows))
    steps = [step for step in foreseen(config) if not isinstance(step, Size)]
    assert all(steps)
    assert all(length > 0 for step in steps for _, length in step)
    assert {sum(length for _, length in step) for step in steps} >= {1, chunk}
    assert max(map(len, steps)) <= rows


def test_a_step_that_cannot_be_run_dry_takes_nothing_from_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Known fault: only the errors that were expected; any other ended it all."""
    ran: list[Any] = []

    def fails(step: Any) -> None:
        ran.append(step)
        if len(ran) in (2, 3):
            raise KeyError(f"number {len(ran)}")

    monkeypatch.setattr(compiler, "CHIPS", {})
    monkeypatch.setattr(compiler, "read_model", lambda folder: MODEL.spec)
    monkeypatch.setattr(compiler, "Dry", lambda *_: SimpleNamespace(run=fails))
    monkeypatch.setattr(compiler, "Compilers", lambda *_: SimpleNamespace(add=None, finish=lambda seconds: FULL))
    with caplog.at_level("INFO"):
        assert compiler.compile_all(job_of(Path("mark"))) == FULL
    assert ran == list(foreseen(CONFIG))
    assert [record.getMessage().count("number") for record in caplog.records] == [1]
    assert f"{ran[1]}: KeyError: 'number 2'" in caplog.text


def test_a_mark_stands_for_all_that_kernels_follow_from() -> None:
    def marked(**changes: Any) -> str:
        return digest(MODEL.spec, replace(CONFIG, **changes), (9, 0), 132)

    assert marked() == marked(memory=replace(CONFIG.memory, num_pages=7), mesh=replace(CONFIG.mesh, replica=1))
    others = [
        marked(memory=replace(CONFIG.memory, page_size=128)),
        marked(model=replace(CONFIG.model, dtype="bfloat16")),
        marked(kernels=replace(CONFIG.kernels, graphs=GraphSizes((1,)))),
        marked(scheduling=replace(CONFIG.scheduling, chunk_size=77)),
        marked(mesh=replace(CONFIG.mesh, tp=2)),
        digest(tiny_model("mla").spec, CONFIG, (9, 0), 132),
        digest(MODEL.spec, CONFIG, (9, 0), 114),
    ]
    assert len({marked(), *others}) == 1 + len(others)


def test_a_key_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, serving=replace(CONFIG.serving, api_key="hunter2"))
    assert "hunter2" not in msgspec.json.encode(ahead.job(tmp_path, config, (9, 0), 132, tmp_path / "m")).decode()


FULL, FAILED, LATE = Result(3, 1, 0, ()), Result(2, 0, 0, ("ValueError: no",)), Result(0, 0, 1, ())


@pytest.mark.parametrize(
    ("result", "codes", "tried"), [(FULL, [0, 0], 1), (FAILED, [1, 0], 1), (LATE, [1, 1], 2), (None, [1, 0], 1)]
)
def test_what_is_late_is_tried_again_and_what_failed_is_told_once(
    result: Result | None, codes: list[int], tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every start would wait for what fails."""
    calls: list[Job] = []

    def compile_all(job: Job) -> Result:
        calls.append(job)
        if result is None:
            raise AttributeError("a fault of ours")
        return result

    monkeypatch.setattr(compiler, "compile_all", compile_all)
    mark = tmp_path / "cache" / "mark"
    assert [compiler.run(job_of(mark)) for _ in range(2)] == codes
    assert (mark.exists(), len(calls)) == (result is not LATE, tried)


def _killed(wanted: tuple[str, str, str], launchers: bool) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return launchers


def test_what_nobody_compiled_since_its_process_was_killed_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, say. Known fault: it counted as what cannot be compiled, which no start tries again."""
    monkeypatch.setattr(compiling, "compile_one", _killed)
    compilers = compiling.Compilers.__new__(compiling.Compilers)
    compilers._pool, compilers._launchers, compilers._work = ProcessPoolExecutor(1), False, []
    compilers.add(("module", "killed", ""))
    wait(compilers._work, 30.0)
    compilers.add(("module", "after it", ""))
    assert compilers.finish(30.0) == Result(0, 0, 2, ())


def test_one_at_a_time_compiles_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "LIMIT_S", 0.2)
    monkeypatch.setattr(compiler, "compile_all", lambda job: FULL)
    with compiler.only_one(tmp_path / "tessera.lock") as alone:
        assert alone
        assert compiler.run(job_of(tmp_path / "mark")) == 0
        assert not (tmp_path / "mark").exists()
    assert compiler.run(job_of(tmp_path / "mark")) == 0
    assert (tmp_path / "mark").exists()
