"""From what was asked to what is needed to start: the model's folder, its spec, and the resolved configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.core.config import Hardware, Notes, Resolved, layered, read, read_environment, resolve
from tessera.core.errors import ConfigError, Conflict, ModelError
from tessera.core.families import read_spec
from tessera.core.spec import ModelSpec
from tessera.run.hardware import measure
from tessera.run.hub import download

ASSETS = Path(__file__).parents[1] / "assets"
NO_MODEL = Conflict(("--model-path",), "no model was named", "Give --model-path, for instance abacus-hybrid.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a start needs. `resolved.config.model.path` is `folder`; ignored environment variables are decisions too."""

    folder: Path
    spec: ModelSpec
    resolved: Resolved


def prepare(
    asked: Mapping[str, object], environ: Mapping[str, str], hardware: Hardware | None = None, weights: bool = True
) -> Prepared:
    """Reads flags (any spelling; they win over `environ`), finds the model and resolves the configuration.

    `hardware`: measured here unless given. `weights` False: a config.json is enough. Raises `ConfigError` with every
    conflict, `ModelError` when the model cannot be found or served.
    """
    environment = read_environment(environ)
    merged = layered(environment.asked, asked)
    notes = Notes()
    values = read(merged, notes)
    path = values.text("model_path")
    if path is None:
        raise ConfigError([*notes.conflicts, NO_MODEL])
    revision, cache = values.text("revision"), values.text("download_dir")
    folder = find_model(path, revision, cache, weights and values.word("load_format") != "dummy")
    found: dict[str, object] = {"model_path": str(folder)}
    if not values.gave("served_model_name"):
        found["served_model_name"] = path
    if (tokenizer := values.text("tokenizer_path")) is not None:
        found["tokenizer_path"] = str(find_model(tokenizer, None, cache, False))
    spec = read_model(folder)
    resolved = resolve(layered(merged, found), spec, hardware or measure(values.word("device")))
    return Prepared(folder, spec, replace(resolved, decisions=(*resolved.decisions, *environment.ignored)))


def find_model(path: str, revision: str | None = None, cache: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model: a folder, a model of this package by its bare name, or a download from the hub."""
    for folder in (Path(path).expanduser(), ASSETS / path if "/" not in path else ASSETS / "none"):
        if folder.is_dir():
            return folder
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return download(path, revision, cache, weights)
    ours = ", ".join(packaged_models()) or "none"
    raise ModelError(f"model '{path}': no such folder, and no hub name (owner/name); models of this package: {ours}")


def packaged_models() -> list[str]:
    """Names of the models inside this package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def read_model(folder: Path) -> ModelSpec:
    """The spec of the model in `folder`. Raises `ModelError` when its config.json is missing or cannot be served."""
    config = _json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} has no config.json, so it is no model folder")
    return read_spec(config, _json(folder / "generation_config.json"))


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, expected an object")
    return found
