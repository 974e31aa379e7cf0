"""`tessera plan` says what a configuration resolves to and the bytes it needs, with no weights and no GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from commands.support import fill, run
from tessera.commands.shown import FORMS
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


def table_of(text: str, title: str) -> dict[str, str]:
    """Names and values of one of the tables."""
    lines = text.split(f"{title}\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)


def test_what_people_read_has_no_raw_data_and_tells_units(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--device", "cpu"], ["--device", "cuda", "--device-memory", "80G", "--quantization", "fp8"]):
        code, text, _ = run(capsys, "plan", str(folder), *argv)
        assert code == 0
        before = text.split("bytes per rank")[0]
        assert not re.search(r"[(\[{]['(\[{)]|None|True|False|\d{8}", before), before
    steps = r"other steps of 64, 128, 192 \.\.\. 1024 tokens \(16 sizes\) in 8, .* ranges.*"
    assert re.fullmatch(
        rf"decode of 1, 2, 4 \.\.\. \d+ rows \(\d+ sizes\); {steps}", table_of(text, "kernels")["graphs"]
    )
    assert table_of(text, "model")["quantization"] == "block 128x128, kept -, loading yes, dequantized no"
    assert table_of(text, "model")["revision"] == "-"
    assert table_of(text, "serving")["drain_timeout"] == "30 s"
    assert table_of(text, "serving")["max_body_size"] == "32.00 MiB"
    assert table_of(text, "scheduling")["mixed"] == "no"
    config = resolve({"model_path": str(folder)}, read_model(folder), Hardware("cpu", 1 << 30)).config.public()
    assert FORMS.keys() <= {name for group in config.values() for name in group}
    assert table_of(run(capsys, "plan", str(folder), "--device", "cpu")[1], "kernels")["graphs"] == "-"


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
