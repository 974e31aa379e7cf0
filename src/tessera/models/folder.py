"""Finds a model: a local folder, or a name on the Hugging Face hub; and reads its spec and its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tessera.core.errors import ModelError
from tessera.core.families import read_spec
from tessera.core.spec import ModelSpec
from tessera.core.tensors import TensorSpec
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.models.safetensors import Checkpoint
from tessera.models.source import Source

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def locate(model_path: str, revision: str | None = None) -> Path:
    """The folder of a model; one that is not local is fetched from the hub (or its cache).

    Raises `ModelError` when there is no such folder and the hub has no such model or cannot be reached.
    """
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model_path.startswith((".", "~")):
        raise ModelError(f"there is no folder {model_path}")
    try:
        return Path(snapshot_download(model_path, revision=revision, allow_patterns=list(PATTERNS)))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"'{model_path}' is no folder here, it is not in the hub's cache, and the hub cannot be reached; "
            "give the path of a folder, or fetch the model where there is a network"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"'{model_path}' is no folder here, and the hub says: {error}") from error


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object of the folder; None when there is no such file. Raises `ModelError` when it cannot be read."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def read_model(folder: Path) -> ModelSpec:
    """The spec of the model in `folder`."""
    config = read_json(folder, "config.json")
    if config is None:
        raise ModelError(f"{folder} holds no config.json; give the folder of a model in Hugging Face form")
    return read_spec(config, read_json(folder, "generation_config.json"))


def open_source(
    folder: Path,
    spec: ModelSpec,
    table: Sequence[TensorSpec],
    load_format: Literal["auto", "safetensors", "dummy"] = "auto",
    seed: int = 0,
) -> Source:
    """Where the weights of `table` come from: the folder's safetensors, or noise of seed `seed` ("dummy")."""
    if load_format == "dummy":
        return Noise(stored_shapes(table), spec.zero_centred, seed)
    return Checkpoint(folder, spec.block)
