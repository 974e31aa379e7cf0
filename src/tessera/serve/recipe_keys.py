"""The keys of a recipe: what each holds, and why some are passed over. The reader is `recipe.py`.

Source: srt-slurm's `docs/config-reference.md`; the keys of `resources` and `backend` may also stand at the top, as in
the second seed's file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tessera.core.config import canonical
from tessera.core.config.flag import text, whole


@dataclass(frozen=True, slots=True)
class Take:
    """A value that counts. `read` raises ValueError, saying what was expected."""

    read: Callable[[object], Any]


@dataclass(frozen=True, slots=True)
class Skip:
    """Known, but it means nothing here."""

    reason: str


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping with keys of its own."""

    name: str


Entry = Take | Skip | Section


def environment(value: object) -> dict[str, str]:
    """Variables of a process."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of variables to values")
    if wrong := [name for name, found in value.items() if isinstance(found, dict | list) or found is None]:
        raise ValueError(f"expected a text for {wrong[0]}")
    spelled = {True: "True", False: "False"}
    return {
        str(name): spelled.get(found, str(found)) if isinstance(found, bool) else str(found)
        for name, found in value.items()
    }


def flags(value: object) -> dict[str, Any]:
    """Flags of a server by name, whatever their spelling; an empty value asks for nothing."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of flags to values")
    found: dict[str, Any] = {}
    for key, one in value.items():
        name = canonical(str(key).replace("-", "_"))
        if isinstance(one, dict):
            raise ValueError(f"expected a plain value for {key}")
        if name in found and found[name] != one:
            raise ValueError(f"{key} is there twice, as {found[name]!r} and as {one!r}; leave one out")
        if one is not None:
            found[name] = one
    return found


def words(value: object) -> dict[str, Any]:
    """A mapping, kept as it is."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value


ROLES = ("prefill", "decode", "aggregated")
ELSEWHERE = "not a part of serving; run `tessera bench` or `tessera eval` against the router"
NO_CONTAINER = "workers run in the environment of this command; containers are Slurm's (--on slurm)"

RESOURCES: Mapping[str, Entry] = {
    "gpu_type": Take(text),
    "gpus_per_node": Take(whole(1)),
    "prefill_nodes": Take(whole(1)),
    "decode_nodes": Take(whole(0)),
    "agg_nodes": Take(whole(1)),
    "prefill_workers": Take(whole(1)),
    "decode_workers": Take(whole(1)),
    "agg_workers": Take(whole(1)),
}
BACKEND: Mapping[str, Entry] = {
    "type": Skip("all workers are Tessera's"),
    "prefill_environment": Take(environment),
    "decode_environment": Take(environment),
    "aggregated_environment": Take(environment),
    "sglang_config": Section("config"),
    "tessera_config": Section("config"),
    "kv_events_config": Skip("the router keeps an approximate prefix tree instead"),
}
SECTIONS: Mapping[str, Mapping[str, Entry]] = {
    "": {
        "name": Take(text),
        "resources": Section("resources"),
        "backend": Section("backend"),
        "model": Section("model"),
        "frontend": Section("frontend"),
        "slurm": Section("slurm"),
        "environment": Take(environment),
        "sbatch_directives": Take(words),
        "container_mounts": Skip(NO_CONTAINER),
        "extra_mount": Skip(NO_CONTAINER),
        "srun_options": Skip(NO_CONTAINER),
        "setup_script": Skip("nothing is run before the workers"),
        **dict.fromkeys(("benchmark", "profiling"), Skip(ELSEWHERE)),
        "dynamo": Skip("the router is Tessera's own"),
        "output": Skip("logs go to --log-dir"),
        "health_check": Skip("workers are watched all the time; --start-timeout bounds the start"),
        "sweep": Skip("give --set for each run"),
        "enable_config_dump": Skip("`tessera up --plan` prints it"),
        **RESOURCES,
        **{key: entry for key, entry in BACKEND.items() if key != "type"},
    },
    "resources": RESOURCES,
    "backend": {**BACKEND, "gpu_type": Take(text)},
    "config": {role: Take(flags) for role in ROLES},
    "model": {
        "path": Take(text),
        "container": Take(text),
        "precision": Skip("the checkpoint says it"),
    },
    "frontend": {
        "type": Skip("the router is Tessera's own"),
        "enable_multiple_frontends": Skip("there is one router"),
        "num_additional_frontends": Skip("there is one router"),
        "args": Take(flags),
        "env": Take(environment),
    },
    "slurm": {"time_limit": Take(text), "account": Take(text), "partition": Take(text)},
}


def nearest(key: str, known: Iterable[str]) -> str:
    """A remedy for a key that nobody knows."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, 1, 0.6)
    return f"Did you mean {near[0]}?" if near else f"Allowed: {', '.join(names)}."
