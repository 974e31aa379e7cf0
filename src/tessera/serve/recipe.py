"""Recipes: which workers a deployment has, with which flags, and on what hardware; read from YAML.

The format is that of the second seed's deployment. Keys may be written with dashes or underscores. A key that means
nothing here is kept as ignored, with the reason; one that nobody knows is an error that names its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from tessera.core.config import BY_KEY, Decision, canonical, suggestion
from tessera.core.config.flag import whole
from tessera.core.errors import ConfigError, Conflict
from tessera.serve.recipe_keys import SECTIONS, Section, Skip, nearest
from tessera.serve.unreadable import unreadable

WORKER = "worker"  # a role that does both; "aggregated" in the file
KINDS = {
    "prefill": "prefill",
    "decode": "decode",
    "aggregated": "agg",
}  # block of flags -> how its resources are called
MODE = "disaggregation_mode"


@dataclass(frozen=True, slots=True)
class Role:
    """Workers of one kind. `flags` by the flag's name; what is no flag stays as it was written.

    `nodes`: hosts for all of them together; 0: they share those of another role.
    """

    name: str
    workers: int
    nodes: int
    flags: Mapping[str, Any]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A deployment. `router`: options of `tessera router`. `slurm`: what its job file asks for."""

    name: str
    roles: tuple[Role, ...]
    gpu_type: str | None = None
    gpus_per_node: int = 8
    router: Mapping[str, Any] = field(default_factory=dict)
    router_environment: Mapping[str, str] = field(default_factory=dict)
    slurm: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[Decision, ...] = ()


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe. Raises `ConfigError` with everything that is wrong, each with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"it cannot be read: {unreadable(error)}"
        raise ConfigError([Conflict((str(path),), why, "Give a recipe's file.")]) from error
    return read_recipe(text, path.name, path.stem)


def read_recipe(text: str, where: str = "recipe", name: str = "recipe") -> Recipe:
    """Reads a recipe's text. `where`: for errors; `name`: unless it says its own."""
    reader = _Reader(where)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            reader.section(reader.plain(root, ()), "", ())
    except yaml.YAMLError as error:
        raise ConfigError([Conflict((where,), unreadable(error), "Give valid YAML.")]) from error
    roles = [] if reader.wrong else reader.roles()
    if reader.wrong:
        raise ConfigError(reader.wrong)
    values = reader.values
    return Recipe(
        name=values.get("name", name),
        roles=tuple(roles),
        gpu_type=values.get("gpu_type"),
        gpus_per_node=values.get("gpus_per_node", 8),
        router=values.get("args", {}),
        router_environment={**values.get("environment", {}), **values.get("env", {})},
        slurm={key: values[key] for key in ("container", "sbatch_directives", *SECTIONS["slurm"]) if key in values},
        ignored=tuple(reader.ignored),
    )


Path_ = tuple[str, ...]


class _Reader:
    """Walks a file against the table of keys; collects values, what is ignored, and what is wrong."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._lines: dict[Path_, int] = {}
        self.values: dict[str, Any] = {}
        self.ignored: list[Decision] = []
        self.wrong: list[Conflict] = []

    def plain(self, node: yaml.Node, path: Path_) -> Any:
        """A node as plain data; remembers where each key stands, and refuses keys that are there twice."""
        if not isinstance(node, yaml.MappingNode):
            return yaml.SafeLoader("").construct_object(node, deep=True)
        found: dict[str, Any] = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            line, first = key_node.start_mark.line + 1, self._lines.get((*path, key))
            self._lines[(*path, key)] = line
            if first is not None:
                self._refuse((*path, key), f"it is there twice, first in line {first}", "Keep one.")
            found[key] = self.plain(value, (*path, key))
        return found

    def section(self, found: object, name: str, path: Path_) -> None:
        """A mapping with a table of keys."""
        if not isinstance(found, dict):
            if found is not None:
                self._refuse(path, f"found {found!r}", "Expected a mapping.")
            return
        table = SECTIONS[name]
        for key, value in found.items():
            here, entry = (*path, key), table.get(key.replace("-", "_"))
            if entry is None:
                self._refuse(here, "there is no such key", nearest(key.replace("-", "_"), table))
            elif isinstance(entry, Skip):
                self.ignored.append(Decision(".".join(here), "ignored", entry.reason))
            elif isinstance(entry, Section):
                self.section(value, entry.name, here)
            elif value is not None:
                self._take(here, key.replace("-", "_"), entry.read, value)
            if name == "config" and isinstance(value, dict):
                for flag in value:
                    if canonical(flag) not in BY_KEY:
                        self._refuse((*here, flag), "there is no such flag", suggestion(flag, BY_KEY))

    def _take(self, here: Path_, key: str, read: Any, value: object) -> None:
        if key in self.values:
            self._refuse(here, "it is given elsewhere too", "Keep one.")
        try:
            self.values[key] = read(value)
        except ValueError as error:
            text = str(error)
            self._refuse(here, f"found {value!r}"[:100], f"{text[:1].upper()}{text[1:]}.")

    def roles(self) -> list[Role]:
        """The roles of the file. Prefill and decode come together, or workers that do both."""
        there = [block for block in KINDS if block in self.values]
        if there not in (["prefill", "decode"], ["aggregated"]):
            reason = f"found flags for {' and '.join(there) or 'no role'}"
            self._refuse(("sglang_config",), reason, "Give prefill and decode, or aggregated.")
            return []
        return [self._role(block) for block in there]

    def _role(self, block: str) -> Role:
        values, kind = self.values, KINDS[block]
        name = WORKER if block == "aggregated" else block
        flags = dict(values[block])
        mode = "null" if name == WORKER else name
        if flags.setdefault(MODE, mode) != mode:
            self._refuse((block, "disaggregation-mode"), f"found {flags[MODE]!r}", f"Expected {mode}, or leave it out.")
        if name == WORKER:
            del flags[MODE]
        if "path" in values:
            flags.setdefault("model_path", values["path"])
        return Role(
            name,
            values.get(f"{kind}_workers", 1),
            values.get(f"{kind}_nodes", 1),
            flags,
            {**values.get("environment", {}), **values.get(f"{block}_environment", {})},
        )

    def _refuse(self, path: Path_, reason: str, remedy: str) -> None:
        line = self._lines.get(path)
        where = f"{self._where}, line {line}" if line else self._where
        self.wrong.append(Conflict((f"{where}: {'.'.join(path)}",), reason, remedy))


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """The recipe with `ROLE.KEY=VALUE` applied in order: VALUE as in YAML, an empty one takes the key away.

    ROLE may be a pattern (`*`) over the roles and `router`; KEY is a flag, `workers`, `nodes` or `environment.NAME`.
    `resources.gpu_type` and `resources.gpus_per_node` are the recipe's. Raises `ConfigError`.
    """
    wrong: list[Conflict] = []
    for change in changes:
        target, _, value = change.partition("=")
        role, dot, key = target.partition(".")
        try:
            if not dot or "=" not in change:
                raise ValueError("expected ROLE.KEY=VALUE, for instance 'prefill.model-path=abacus-hybrid'")
            recipe = _changed(recipe, role, key.replace("-", "_"), yaml.safe_load(value))
        except (ValueError, yaml.YAMLError) as error:
            names = ", ".join([*(r.name for r in recipe.roles), "router", "resources", "'*'"])
            why = unreadable(error) if isinstance(error, yaml.YAMLError) else str(error)
            wrong.append(Conflict((f"--set {change}",), why, f"Roles: {names}."))
    if wrong:
        raise ConfigError(wrong)
    return recipe


def _changed(recipe: Recipe, pattern: str, key: str, value: Any) -> Recipe:
    if pattern == "resources":
        if key == "gpu_type":
            return replace(recipe, gpu_type=None if value is None else str(value))
        if key == "gpus_per_node":
            number: int = whole(1)(value)  # type: ignore[assignment]
            return replace(recipe, gpus_per_node=number)
        raise ValueError("expected gpu_type or gpus_per_node")
    chosen = [role.name for role in recipe.roles if fnmatchcase(role.name, pattern)]
    if not chosen and pattern != "router":
        raise ValueError(f"there is no role {pattern!r}")
    if pattern == "router":
        recipe = replace(recipe, router=_with(recipe.router, key, value))
    roles = [_role_with(role, key, value) if role.name in chosen else role for role in recipe.roles]
    return replace(recipe, roles=tuple(roles))


def _role_with(role: Role, key: str, value: Any) -> Role:
    if key in ("workers", "nodes"):
        least = 0 if (role.name, key) == ("decode", "nodes") else 1
        number: int = whole(least)(value)  # type: ignore[assignment]
        return replace(role, workers=number) if key == "workers" else replace(role, nodes=number)
    block, dot, name = key.partition(".")
    if dot and block in ("environment", "env"):
        return replace(role, environment=_with(role.environment, name, None if value is None else str(value)))
    if isinstance(value, dict):
        raise ValueError("expected a plain value")
    return replace(role, flags=_with(role.flags, canonical(key), value))


def _with(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    rest = {name: one for name, one in values.items() if name != key}
    return rest if value is None else {**rest, key: value}
