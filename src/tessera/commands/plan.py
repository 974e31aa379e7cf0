"""`tessera plan`: the resolved configuration and the bytes of each rank. Needs a config.json; no weights, no GPU."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping

from tessera.commands.settings import flags
from tessera.commands.shown import shown
from tessera.commands.terminal import pairs, table, write
from tessera.core.config import Hardware, MemoryConfig, Notes, Resolved, read
from tessera.core.config.flag import size
from tessera.core.config.kernels import LIBRARIES
from tessera.core.config.memory import gib
from tessera.core.errors import ConfigError, Conflict
from tessera.run.startup import prepare

IN_BYTES = "needs"  # told line by line as bytes of a rank


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Resolves and prints; nothing is started."""
    given = flags(options, asked)
    hardware = planned(options, given) if options.device_memory else None
    show(given, environ, hardware, options.json)
    return 0


def show(
    asked: Mapping[str, object], environ: Mapping[str, str], hardware: Hardware | None = None, as_json: bool = False
) -> None:
    """Prints what `asked` resolves to, on `hardware` or on this host."""
    resolved = prepare(asked, environ, hardware, weights=False).resolved
    if as_json:
        write(json.dumps(as_data(resolved), indent=2))
        return
    for group, values in resolved.config.public().items():
        pairs(group, {name: shown(name, value) for name, value in values.items() if name != IN_BYTES})
    table("bytes per rank", [(name, gib(count), count) for name, count in budget(resolved.config.memory).items()])
    table("decisions", [(d.what, d.value, d.why) for d in resolved.decisions])


def budget(memory: MemoryConfig) -> dict[str, int]:
    """What the memory of one rank goes to, bytes."""
    return {
        "weights": memory.weight_bytes,
        "KV pages": memory.kv_bytes,
        "recurrent state": memory.state_bytes,
        **dict(memory.needs),
        "weights and pools may take": memory.budget,
        "free at start": memory.available,
    }


def as_data(resolved: Resolved) -> dict[str, object]:
    """A resolved configuration as plain data."""
    decisions = [{"what": d.what, "value": d.value, "why": d.why} for d in resolved.decisions]
    return {**resolved.config.public(), "bytes": budget(resolved.config.memory), "decisions": decisions}


def planned(options: Namespace, asked: Mapping[str, object]) -> Hardware:
    """The hardware that is planned for."""
    try:
        memory = size(options.device_memory)
    except ValueError as error:
        asked_for = (f"--device-memory {options.device_memory}",)
        raise ConfigError([Conflict(asked_for, str(error), "For instance 80G.")]) from error
    device = read(asked, Notes()).word("device")
    if device == "cuda":
        return Hardware(
            "cuda", memory, count=options.num_devices, name="planned", capability=(9, 0), libraries=tuple(LIBRARIES)
        )
    return Hardware("cpu", memory, name="planned")
