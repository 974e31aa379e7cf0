"""A start finds its model, and what is asked wins over the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.core.config import Hardware
from tessera.core.errors import ConfigError, ModelError
from tessera.models.folder import find_model, packaged_models
from tessera.run.startup import prepare

CPU = Hardware("cpu", memory=1 << 30)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_folder_with_a_config_is_enough(folder: Path) -> None:
    prepared = prepare({"model_path": str(folder)}, {}, CPU)
    assert prepared.folder == folder
    assert prepared.resolved.config.model.served_name == str(folder)
    assert prepared.resolved.config.model.tokenizer_path == str(folder)


def test_flags_win_over_the_environment_in_any_spelling(folder: Path) -> None:
    environ = {"TESSERA_PORT": "1", "TESSERA_MODEL_PATH": str(folder), "SGLANG_DG_CACHE_DIR": "x"}
    prepared = prepare({"--port": 2}, environ, CPU)
    assert prepared.resolved.config.serving.port == 2
    assert prepare({}, environ, CPU).resolved.config.serving.port == 1
    assert "SGLANG_DG_CACHE_DIR" in [d.what for d in prepared.resolved.decisions]


def test_packaged_models_go_by_their_bare_name() -> None:
    for name in packaged_models():
        prepared = prepare({"model_path": name}, {}, CPU, weights=False)
        assert prepared.folder.is_dir()
        assert prepared.resolved.config.model.served_name == name


def test_without_a_model_all_else_is_refused_too() -> None:
    with pytest.raises(ConfigError) as caught:
        prepare({"pp": 2}, {}, CPU)
    assert [c.flags for c in caught.value.conflicts] == [("--pp-size 2",), ("--model-path",)]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for path in ("nonsense", "/no/such/folder"):
        with pytest.raises(ModelError, match="no such folder"):
            find_model(path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        prepare({"model_path": str(tmp_path)}, {}, CPU)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        prepare({"model_path": str(tmp_path)}, {}, CPU)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "config.json: it names neither architectures nor a model_type; this build serves: "),
        ({"architectures": ["X"]}, "config.json: architectures ['X'] with model_type None is unknown; "),
    ],
)
def test_a_config_of_no_model_that_is_served_says_what_it_names(
    config: dict[str, object], said: str, folder: Path
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        prepare({"model_path": str(folder)}, {}, CPU, weights=False)
    assert str(caught.value).startswith(said)


def test_a_hub_name_without_a_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="check the name, the network"):
        find_model("nobody/nothing", cache=str(tmp_path))
