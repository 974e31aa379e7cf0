"""`tessera plan`: the resolved configuration and the bytes of each rank. Needs a config.json; no weights, no GPU."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping

from tessera.commands.settings import flags
from tessera.commands.terminal import pairs, table, write
from tessera.core.config import Hardware, MemoryConfig, Notes, Resolved, read
from tessera.core.config.flag import size
from tessera.core.config.memory import gib
from tessera.core.errors import ConfigError, Conflict
from tessera.run.startup import Prepared, prepare


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Resolves and prints; nothing is started."""
    hardware = _planned(options, asked) if options.device_memory else None
    show(prepare(flags(options, asked), environ, hardware, weights=False), options.json)
    return 0


def show(found: Prepared, as_json: bool = False) -> None:
    """Prints a prepared start."""
    if as_json:
        write(json.dumps(as_data(found.resolved), indent=2))
        return
    for group, values in found.resolved.config.public().items():
        pairs(group, values)
    table("bytes per rank", [(name, gib(count), count) for name, count in budget(found.resolved.config.memory).items()])
    table("decisions", [(d.what, d.value, d.why) for d in found.resolved.decisions])


def budget(memory: MemoryConfig) -> dict[str, int]:
    """What the memory of one rank goes to, bytes."""
    return {
        "weights": memory.weight_bytes,
        "KV pages": memory.kv_bytes,
        "recurrent state": memory.state_bytes,
        "graphs": memory.graph_bytes,
        "workspace (estimate)": memory.workspace_bytes,
        "weights and pools may take": memory.budget,
        "free at start": memory.available,
    }


def as_data(resolved: Resolved) -> dict[str, object]:
    """A resolved configuration as plain data."""
    decisions = [{"what": d.what, "value": d.value, "why": d.why} for d in resolved.decisions]
    return {**resolved.config.public(), "bytes": budget(resolved.config.memory), "decisions": decisions}


def _planned(options: Namespace, asked: Mapping[str, object]) -> Hardware:
    try:
        memory = size(options.device_memory)
    except ValueError as error:
        conflict = Conflict((f"--device-memory {options.device_memory}",), str(error), "For instance 80G.")
        raise ConfigError([conflict]) from error
    device = read(flags(options, asked), Notes()).word("device")
    if device == "cuda":
        return Hardware("cuda", memory, name="planned", capability=(9, 0))
    return Hardware("cpu", memory, name="planned")
