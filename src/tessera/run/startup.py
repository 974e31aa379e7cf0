"""From what was asked to what is needed to start: the model's folder, its spec, and the resolved configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tessera.core.config import Hardware, Notes, Resolved, layered, read, read_environment, resolve
from tessera.core.errors import ConfigError, Conflict, ModelError
from tessera.core.spec import ModelSpec
from tessera.models.folder import find_model, read_model
from tessera.run.hardware import measure
from tessera.run.needs import NEEDS
from tessera.run.stages import Stages

NO_MODEL = Conflict(("--model-path",), "no model was named", "Give --model-path, for instance abacus-hybrid.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a start needs. `resolved.config.model.path` is `folder`; ignored environment variables are decisions too."""

    folder: Path
    spec: ModelSpec
    resolved: Resolved
    stages: Stages = field(default_factory=Stages)

    def as_replica(self, number: int) -> Prepared:
        """The same start, of another of several replicas."""
        config = self.resolved.config
        mesh = replace(config.mesh, replica=number)
        return replace(self, resolved=replace(self.resolved, config=replace(config, mesh=mesh)))


def prepare(
    asked: Mapping[str, object],
    environ: Mapping[str, str],
    hardware: Hardware | None = None,
    weights: bool = True,
    stages: Stages | None = None,
) -> Prepared:
    """Reads flags (any spelling; they win over `environ`), finds the model and resolves the configuration.

    `hardware`: measured here unless given. `weights` False: a config.json is enough. Raises `ConfigError` with every
    conflict, `ModelError` when the model cannot be found or served. `stages`: of the start, so far.
    """
    stages = stages or Stages()
    with stages.timed("config"):
        return replace(_prepared(asked, environ, hardware, weights), stages=stages)


def _prepared(
    asked: Mapping[str, object], environ: Mapping[str, str], hardware: Hardware | None, weights: bool
) -> Prepared:
    environment = read_environment(environ)
    merged = layered(environment.asked, asked)
    notes = Notes()
    values = read(merged, notes)
    path = values.text("model_path")
    if path is None:
        raise ConfigError([*notes.conflicts, NO_MODEL])
    revision, cache = values.text("revision"), values.text("download_dir")
    try:
        folder = find_model(path, revision, cache, weights and values.word("load_format") != "dummy")
        spec = read_model(folder)
    except ModelError as error:
        if not notes.conflicts:
            raise
        wrong = Conflict((f"--model-path {path}",), str(error), "Name another model, or mend this one.")
        raise ConfigError([*notes.conflicts, wrong]) from error
    found: dict[str, object] = {"model_path": str(folder)}
    if not values.gave("served_model_name"):
        found["served_model_name"] = path
    if (tokenizer := values.text("tokenizer_path")) is not None:
        found["tokenizer_path"] = str(find_model(tokenizer, None, cache, False, "--tokenizer-path"))
    resolved = resolve(layered(merged, found), spec, hardware or measure(values.word("device")), NEEDS)
    return Prepared(folder, spec, replace(resolved, decisions=(*resolved.decisions, *environment.ignored)))
