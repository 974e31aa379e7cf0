"""Models by hub name: downloads once into the hub's own cache, and works from there offline."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from tessera.core.errors import ModelError

TEXT = ("*.json", "*.jinja", "*.model", "*.txt")


def download(name: str, revision: str | None = None, cache: str | None = None, weights: bool = True) -> Path:
    """The folder of hub model `name` at `revision`. `weights` False: config and tokeniser only.

    Raises `ModelError` when there is no such model, no access, or no network and nothing in the cache.
    """
    patterns = [*TEXT, "*.safetensors"] if weights else list(TEXT)
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model '{name}'{where}: no such folder here, and the hub gave nothing ({reason}); "
            "check the name, the network or HF_TOKEN, or give a folder"
        ) from error
    return Path(folder)
