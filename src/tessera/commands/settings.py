"""The flags of a command: those of a YAML file beneath those of the command line."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import yaml

from tessera.core.config import canonical, layered
from tessera.core.errors import ConfigError, Conflict
from tessera.serve.unreadable import unreadable


def flags(options: Namespace, asked: Mapping[str, object]) -> dict[str, object]:
    """The flags of `--config`, under those of the command line, by name. What is no flag is refused by `prepare`."""
    given = layered(read_yaml(options.config), asked) if options.config else asked
    return {canonical(key): value for key, value in given.items()}


def read_yaml(path: Path) -> dict[str, object]:
    """Flags from a YAML file: one mapping of names (with or without dashes in front) to values."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad(path, unreadable(error)) from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise _bad(path, f"it holds {type(found).__name__}, not a mapping of flags to values")
    return found


def _bad(path: Path, reason: str) -> ConfigError:
    return ConfigError([Conflict((f"--config {path}",), reason, "Give a YAML file such as `tp-size: 1`.")])
