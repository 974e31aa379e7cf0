"""`tessera up --plan`: what becomes of every key of a recipe, on the hardware that it names; nothing is started."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

from tessera.commands.terminal import table, write
from tessera.core.config import Hardware
from tessera.core.config.memory import gib
from tessera.core.errors import ConfigError, Conflict
from tessera.serve.deployment import across_hosts
from tessera.serve.recipe import Recipe
from tessera.serve.recipe_hardware import GPUS, assumed
from tessera.serve.recipe_plan import Plan, apart, as_data, misplaced, plan


def show(recipe: Recipe, as_json: bool, here: bool) -> int:
    """Prints it; 0 when every worker can run, else 2. `here`: all on this host, where the recipe names no other."""
    hardware, told = _hardware(recipe)
    recipe = recipe if hardware is None else across_hosts(recipe)
    plans = [plan(role, None if _on_cpu(role.flags) else hardware) for role in recipe.roles]
    wrong, unfit = misplaced(recipe, hardware, packed=here and hardware is None), apart(plans)
    can = all(found.resolved is not None for found in plans) and not wrong and not unfit
    ignored = [{"key": d.what, "why": d.why} for d in recipe.ignored]
    if as_json:
        roles = [as_data(found) for found in plans]
        write(
            json.dumps(
                {
                    "recipe": recipe.name,
                    "hardware": told,
                    "can_run": can,
                    "roles": roles,
                    "hosts": [str(c) for c in wrong],
                    "pairs": [str(c) for c in unfit],
                    "ignored": ignored,
                },
                indent=2,
            )
        )
        return 0 if can else 2
    write(f"{recipe.name}: {told}\n")
    for found in plans:
        title = f"{found.role.name}: {found.role.workers} worker(s), {'can run' if found.resolved else 'cannot run'}"
        table(title, [(v.key, v.value, v.fate, v.why) for v in found.verdicts], ("key", "value", "", "why"))
        _conclusions(found)
    if wrong:
        table("hosts", [(str(conflict),) for conflict in wrong])
    if unfit:
        table("prefill and decode do not fit", [(str(conflict),) for conflict in unfit])
    if recipe.ignored:
        table("ignored", [(d.what, d.why) for d in recipe.ignored])
    return 0 if can else 2


def _conclusions(found: Plan) -> None:
    if found.resolved is not None:
        memory = found.resolved.config.memory
        sizes = [
            ("weights", memory.weight_bytes),
            ("KV pages", memory.kv_bytes),
            ("recurrent state", memory.state_bytes),
        ]
        table("bytes per rank", [(name, gib(count)) for name, count in [*sizes, ("free at start", memory.available)]])
        given = {key.replace("_", "-") for key in found.role.flags}
        own = [d for d in found.resolved.decisions if d.value != "ignored" and d.what.removeprefix("--") not in given]
        table("chosen", [(d.what, d.value, d.why) for d in own])
    if found.conflicts:
        table("refused", [(str(conflict),) for conflict in found.conflicts])


def _on_cpu(flags: Mapping[str, Any]) -> bool:
    return flags.get("device") == "cpu"


def _hardware(recipe: Recipe) -> tuple[Hardware | None, str]:
    """What the recipe says that it runs on; None: this host."""
    if recipe.gpu_type is None or all(_on_cpu(role.flags) for role in recipe.roles):
        return (
            None,
            f"planned for this host ({socket.gethostname()})" if recipe.gpu_type is None else "planned for this CPU",
        )
    found = assumed(recipe.gpu_type, recipe.gpus_per_node)
    if found is None:
        remedy = "Use --set resources.gpu_type=..., or an empty one for this host."
        reason = f"it is not known; known are: {', '.join(GPUS)}"
        raise ConfigError([Conflict((f"gpu_type {recipe.gpu_type}",), reason, remedy)])
    return (
        found,
        f"planned for hosts of {recipe.gpus_per_node} {recipe.gpu_type}, {gib(found.memory)} free each (assumed)",
    )
