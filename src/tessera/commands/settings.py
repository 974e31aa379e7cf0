"""From a command line to a prepared start: the YAML file beneath the flags, and what is printed about decisions."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import yaml

from tessera.commands.terminal import say
from tessera.core.config import Hardware, Resolved, layered
from tessera.core.errors import ConfigError, Conflict
from tessera.run.startup import Prepared, prepare


def prepared(
    options: Namespace,
    asked: Mapping[str, object],
    environ: Mapping[str, str],
    hardware: Hardware | None = None,
    weights: bool = True,
) -> Prepared:
    """Everything that a start needs. Raises `ConfigError` and `ModelError`."""
    return prepare(flags(options, asked), environ, hardware, weights)


def flags(options: Namespace, asked: Mapping[str, object]) -> dict[str, object]:
    """The flags of `--config`, under those of the command line."""
    return layered(read_yaml(options.config), asked) if options.config else dict(asked)


def read_yaml(path: Path) -> dict[str, object]:
    """Flags from a YAML file: one mapping of names (with or without dashes in front) to values."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad(path, " ".join(str(error).split())) from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise _bad(path, f"it holds {type(found).__name__}, not a mapping of flags to values")
    return found


def _bad(path: Path, reason: str) -> ConfigError:
    return ConfigError([Conflict((f"--config {path}",), reason, "Give a YAML file such as `tp-size: 1`.")])


def tell(resolved: Resolved) -> None:
    """Prints the decisions, once, on standard error."""
    for decision in resolved.decisions:
        say(f"  {decision}")
