"""`tessera plan` says what a configuration resolves to and the bytes it needs, with no weights and no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands.support import fill, run
from tessera.commands.plan import told
from tessera.core.config import resolve
from tessera.core.config.types import Hardware
from tessera.run.startup import read_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("model"))


def test_the_resolved_configuration_and_its_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "plan",
        str(folder),
        "--device",
        "cpu",
        "--page-size",
        "8",
        "--max-total-tokens",
        "800",
        "--dtype",
        "float32",
    ]
    code, out, _ = run(capsys, *argv, "--device-memory", "1G", "--json")
    data = json.loads(out)
    expected = resolve(
        {"model_path": str(folder), "device": "cpu", "page_size": 8, "max_total_tokens": 800, "dtype": "float32"},
        read_model(folder),
        Hardware("cpu", 1 << 30, name="planned"),
    ).config
    assert code == 0
    assert data["memory"]["num_pages"] == 101
    assert data["bytes"]["KV pages"] == expected.memory.kv_bytes == 101 * 2 * 2 * 2 * 8 * 8 * 4
    assert data["bytes"]["weights"] == expected.memory.weight_bytes
    assert data["bytes"]["free at start"] == 1 << 30
    assert {d["what"] for d in data["decisions"]} >= {"KV pool", "mem-fraction-static", "chunked-prefill-size"}
    code, text, _ = run(capsys, *argv, "--device-memory", "1G")
    for line in ("bytes per rank", "decisions", "page_size", "row tables", f"{expected.memory.weight_bytes}"):
        assert line in text
    assert "((" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), ("", "-"), (0, "0"), (((1, 2), (), (3,)), "1 2; 3"), (((), ()), "-")]
)
def test_values_are_told_plainly(value: object, text: str) -> None:
    assert told(value) == text


def test_serve_plan_is_the_same_and_serves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--device", "cpu", "--max-total-tokens", "256"]
    code, out, _ = run(capsys, "serve", *argv, "--plan")
    assert code == 0
    assert "bytes per rank" in out


def test_a_gpu_can_be_planned_for_without_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", str(folder), "--device", "cuda", "--device-memory", "80G", "--json")
    data = json.loads(out)
    assert (code, data["mesh"]["device"], data["bytes"]["free at start"]) == (0, "cuda", 80 << 30)


def test_what_cannot_be_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", str(folder), "--device-memory", "lots")
    assert (code, "--device-memory lots" in err) == (2, True)
    code, _, err = run(capsys, "plan", str(folder), "--device", "cpu", "--device-memory", "64K")
    assert (code, "--mem-fraction-static" in err) == (2, True)
    code, _, err = run(capsys, "plan", "no-such-model")
    assert (code, "models of this package" in err, "Traceback" in err) == (1, True, False)
