"""The CPU benchmark's own arithmetic, and that it runs all engines on one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.bench.scripts import script

cpu = script("cpu")


def test_rates() -> None:
    measured = cpu.Measured([[1, 2, 3], [4, 5, 6]], [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert measured.tokens_per_s == pytest.approx(6 / 4)
    assert measured.decode_per_s == pytest.approx(3 / 2), "three tokens came after the moment 2.0, in two seconds"


@pytest.mark.slow
def test_all_engines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model, with the figures of every engine in the JSON and the same first tokens."""
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    monkeypatch.setattr(cpu, "SHAPE", {**cpu.SHAPE, **small, "num_attention_heads": 4, "num_key_value_heads": 2})
    sizes = ["--requests", "2", "--rounds", "1", "--input-len", "8", "--output-len", "4"]
    cpu.main([*sizes, "--json", "--model-path", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {r["engine"] for r in found["results"]} == {"generate", "continuous", "tessera"}
    assert all(r["tokens_per_s"] > 0 and r["decode_per_s"] > 0 for r in found["results"])
    assert (tmp_path / "model.safetensors").is_file()
