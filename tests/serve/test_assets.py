"""What serving reads beside a model: tokenizer, chat template, special tokens, sampling defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tessera
from serve.support import byte_tokenizer
from tessera.core.errors import ModelError, RequestError
from tessera.serve.assets import load_assets
from tessera.serve.schema import Limits, Reader

SAY = [{"role": "user", "content": "x"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settings(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def rendered(folder: Path, asked: str | None = None) -> str:
    template = load_assets(folder, None, asked).template
    assert template is not None
    return template.render(SAY)


def test_the_template_is_found_wherever_models_keep_it(folder: Path) -> None:
    assert load_assets(folder, None, None).template is None
    settings(folder, chat_template="inline {{ eos_token }}", eos_token={"content": "<e>"})
    assert rendered(folder) == "inline <e>"
    named = [{"name": "default", "template": "first"}, {"name": "tools", "template": "second"}]
    settings(folder, chat_template=named)
    assert (rendered(folder), rendered(folder, "tools")) == ("first", "second")
    (folder / "chat_template.jinja").write_text("own file")
    assert rendered(folder) == "own file"
    (folder / "mine.jinja").write_text("asked for")
    assert rendered(folder, str(folder / "mine.jinja")) == "asked for"
    with pytest.raises(ModelError, match=r"neither a file nor a template .* default, tools"):
        load_assets(folder, None, "nothing")


def test_sampling_defaults_come_from_the_model_and_requests_win(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 1}))
    assets = load_assets(folder, None, None)
    assert assets.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    reader = Reader(Limits(64, 259), assets.tokenizer, None, assets.sampling_defaults)
    params = reader.completion({"prompt": "a", "temperature": 0}).items[0].params
    assert (params.temperature, params.top_k) == (0.0, 20)


def test_a_server_without_a_tokenizer_takes_and_gives_ids(folder: Path) -> None:
    assets = load_assets(folder, None, None, skip_tokenizer=True)
    assert (assets.tokenizer, assets.template) == (None, None)
    reader = Reader(Limits(64, 259), None)
    assert reader.completion({"prompt": [1, 2]}).items[0].tokens == [1, 2]
    for body in ({"prompt": "text"}, {"prompt": [1], "stop": "x"}):
        with pytest.raises(RequestError, match="--skip-tokenizer-init"):
            reader.completion(body)
    with pytest.raises(RequestError, match="--skip-tokenizer-init"):
        reader.chat({"messages": SAY})


def test_broken_files_are_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_assets(folder, None, None)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected an object"):
        load_assets(folder, None, None)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes a tokenizer without a vocabulary of a config.json alone: it reads and writes no text."""
    config = Path(tessera.__file__).parent / "assets" / "abacus-hybrid" / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    with pytest.raises(ModelError, match=r"has no tokenizer.* --tokenizer-path, or --skip-tokenizer-init"):
        load_assets(tmp_path, None, None)


@pytest.mark.parametrize("name", ["abacus-hybrid", "abacus-mla"])
def test_the_packaged_models_chat(name: str) -> None:
    assets = load_assets(Path(tessera.__file__).parent / "assets" / name, None, None)
    assert assets.template is not None
    assert assets.tokenizer is not None
    text = assets.template.render(SAY)
    assert assets.tokenizer.decode(assets.tokenizer.encode(text, False), skip_special=False) == text
