"""From what was asked to what is needed to start: the model's folder, its spec, and the resolved configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tessera.core.config import Hardware, Notes, Resolved, read, read_environment, resolve
from tessera.core.errors import ConfigError
from tessera.core.spec import ModelSpec
from tessera.run.hardware import measure

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True, slots=True)
class Prepared:
    """`resolved.config.model.path` is `folder`; its decisions include the environment variables that are ignored."""

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
    notes = Notes()
    values = read(asked, notes)
    values = read({**_as_given(environment.asked, asked), **asked}, notes := Notes())
    path = values.text("model_path")
    if path is None:
        raise ConfigError([*notes.conflicts, NO_MODEL])
    weights = weights and values.word("load_format") != "dummy"
    folder = find_model(path, values.text("revision"), values.text("download_dir"), weights)
    spec = read_model(folder)
    found = {**_as_given(environment.asked, asked), **asked}
    resolved = resolve(found, spec, hardware or measure(values.word("device")))
    return Prepared(folder, spec, replace(resolved, decisions=(*resolved.decisions, *environment.ignored)))
