"""Finds a model: a folder, a model of this package, or a name on the hub; and reads its spec and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from tessera.core.config.types import Config, ModelConfig
from tessera.core.errors import ModelError
from tessera.core.families import read_spec
from tessera.core.quantization import Quantization
from tessera.core.spec import ModelSpec
from tessera.core.tensors import FP8, TensorSpec
from tessera.core.weights import weight_table
from tessera.models.checkpoint import Checkpoint
from tessera.models.load import stored_shapes, unserved
from tessera.models.noise import Noise
from tessera.models.quantizing import Quantizing
from tessera.models.source import Source

ASSETS = Path(__file__).parents[1] / "assets"
TEXT = ("*.json", "*.jinja", "*.model", "*.txt")
WEIGHTS = ("*.safetensors",)
SAMPLE = 1 << 12  # bytes of each weight file, from its middle and its end


def packaged_models() -> list[str]:
    """Names of the models inside this package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def find_model(
    path: str, revision: str | None = None, cache: str | None = None, weights: bool = True, what: str = "model"
) -> Path:
    """The local folder of a model: a folder, a model of this package by its bare name, or a download from the hub.

    `weights` False: config and tokeniser are enough. `what` it is, for errors. Raises `ModelError` when there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path in packaged_models():
        return ASSETS / path
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _fetch(path, revision, cache, TEXT + WEIGHTS if weights else TEXT, what)
    ours = ", ".join(packaged_models()) or "none"
    found = "a file, and a folder is needed" if folder.is_file() else "no such folder, and no hub name (owner/name)"
    raise ModelError(f"{what} '{path}': {found}; models of this package: {ours}")


def _fetch(name: str, revision: str | None, cache: str | None, patterns: Sequence[str], what: str) -> Path:
    """The folder of a hub model, fetched once into the hub's own cache; from there it works offline.

    Raises `ModelError` when there is no such model, no access, or no network and nothing in the cache.
    """
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=list(patterns)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{what} '{name}'{where}: no such folder here, and the hub gave nothing ({reason}); "
            "check the name, the network or HF_TOKEN, or give a folder"
        ) from error
    return Path(found)


def read_model(folder: Path) -> ModelSpec:
    """The spec of the model in `folder`. Raises `ModelError` when its config.json is missing or cannot be served."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} has no config.json, so it is no model folder")
    return read_spec(config, _read_json(folder / "generation_config.json"))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def open_source(
    folder: Path,
    spec: ModelSpec,
    table: Sequence[TensorSpec],
    load_format: str = "auto",
    seed: int = 0,
    kv_dtype: str = "",
    quantization: Quantization | None = None,
) -> Source:
    """Where the weights of `table` come from: the folder's safetensors, or noise of seed `seed` ("dummy").

    `kv_dtype`: of the pages. Raises `ModelError` for a checkpoint that cannot be served with them. `quantization`: done
    here, if it is to be done while weights are loaded.
    """
    found: Source
    if load_format == "dummy":
        found = Noise(stored_shapes(table), spec.zero_centred, seed)
    else:
        found = checkpoint = Checkpoint(folder, spec.quantization.block if spec.quantization is not None else None)
        if kv_dtype in FP8:
            checkpoint.refuse_cache_scales(partial(unserved, expected=stored_shapes(table)))
    if quantization is not None and quantization.loading:
        return Quantizing(found, quantization)
    return found


def configured_source(folder: Path, spec: ModelSpec, config: Config) -> Source:
    """Where the weights of a configuration's model come from: see `open_source`."""
    table, model = weight_table(spec, config.mesh.mesh), config.model
    kv_dtype = config.memory.kv_dtype
    return open_source(folder, spec, table, model.load_format, model.seed, kv_dtype, model.quantization)


def weights_version(model: ModelConfig) -> str:
    """Tells checkpoints apart by names, sizes and samples of the files, not by where they lie."""
    made = f" fp8 {model.quantization.block}" if model.quantization is not None and model.quantization.loading else ""
    found = hashlib.sha256(f"{model.dtype}{made}".encode())
    files = sorted(Path(model.path).glob("*.safetensors"))
    if model.load_format == "dummy" or not files:
        found.update(f"{model.load_format} {model.seed}".encode())
        return found.hexdigest()[:16]
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for at in (max(size // 2, 0), max(size - SAMPLE, 0)):
                file.seek(at)
                found.update(file.read(SAMPLE))
    return found.hexdigest()[:16]
