"""The files beside a model that serving reads: tokenizer, chat template, sampling defaults. No weights, no torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from tessera.core.config import Config
from tessera.core.errors import ModelError
from tessera.serve.chat import ChatTemplate
from tessera.serve.schema import Limits, Reader
from tessera.serve.text import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
ANOTHER = "give --tokenizer-path, or --skip-tokenizer-init to serve token ids"
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class TextAssets:
    """What the text side needs of a model. `tokenizer` is None when the server takes and gives token ids only."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)


def load_assets(model: Path, tokenizer: Path | None, template: str | None, skip_tokenizer: bool = False) -> TextAssets:
    """Reads a model's text files. `tokenizer`: its folder, if another. `template`: a file, or a name in the model's.

    Raises ModelError when the tokenizer or the template cannot be read.
    """
    folder = tokenizer or model
    defaults = _json(model / "generation_config.json")
    sampling = {name: defaults[name] for name in SAMPLING_DEFAULTS if isinstance(defaults.get(name), int | float)}
    if skip_tokenizer:
        return TextAssets(None, None, sampling)
    settings = _json(folder / "tokenizer_config.json")
    source = _template(folder, settings, template)
    tokens = _special_tokens(folder, settings)
    return TextAssets(_tokenizer(folder), ChatTemplate(source, tokens) if source else None, sampling)


def make_reader(config: Config, folder: Path, vocab_size: int) -> Reader:
    """What reads requests for the model in `folder`: its text files, and the limits of a configuration. Raises
    `ModelError`."""
    model = config.model
    tokenizer = Path(model.tokenizer_path) if model.tokenizer_path else None
    assets = load_assets(folder, tokenizer, model.chat_template, skip_tokenizer=tokenizer is None)
    limits = Limits.of(config, vocab_size)
    return Reader(limits, assets.tokenizer, assets.template, assets.sampling_defaults, model.seed)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}") from error
    transformers = importlib.import_module("transformers")  # heavy, and only for folders without tokenizer.json
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be read: {error}; {ANOTHER}") from error
    inner = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(inner, tokenizers.Tokenizer):
        made = type(loaded).__name__
        raise ModelError(f"{folder} has no tokenizer.json, and {made} cannot be made a fast tokenizer; {ANOTHER}")
    if inner.get_vocab().keys() <= {token.content for token in inner.get_added_tokens_decoder().values()}:
        # transformers makes an empty one of the config.json alone
        raise ModelError(f"{folder} has no tokenizer: found neither a tokenizer.json nor a vocabulary; {ANOTHER}")
    return Tokenizer(inner)


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    known = {**_json(folder / "special_tokens_map.json"), **settings}
    found = {}
    for name in SPECIAL_TOKENS:
        value = known.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _template(folder: Path, settings: Mapping[str, Any], asked: str | None) -> str | None:
    """Source of the template: the file asked for, or the model's of that name, or the model's default."""
    if asked is not None and Path(asked).is_file():
        return Path(asked).read_text(encoding="utf-8")
    named = _templates(folder, settings)
    if asked is not None and asked not in named:
        have = ", ".join(sorted(named)) or "none"
        raise ModelError(f"--chat-template {asked}: neither a file nor a template of this model (it has: {have})")
    return named.get(asked or "default")


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The model's templates by name: in tokenizer_config.json (text, or a list of named ones), or in own files."""
    inline = settings.get("chat_template")
    items: list[Any] = inline if isinstance(inline, list) else [{"name": "default", "template": inline}]
    named = {item["name"]: item["template"] for item in items if isinstance(item.get("template"), str)}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        named[path.stem] = path.read_text(encoding="utf-8")
    single = folder / "chat_template.jinja"
    if single.is_file():
        named["default"] = single.read_text(encoding="utf-8")
    return named
