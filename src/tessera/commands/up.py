"""`tessera up`: all processes of a recipe, until a signal; or its plan; or its job files."""

from __future__ import annotations

import json
import socket
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop

from tessera.commands.terminal import say, table, write
from tessera.commands.upview import Screen, screen
from tessera.core.config import Hardware
from tessera.core.config.memory import gib
from tessera.core.errors import ConfigError, Conflict
from tessera.serve import logs
from tessera.serve.deployment import DEVICES, Deployment, Site, across_hosts, deploy, numbered
from tessera.serve.here import Here, Starter, free_port
from tessera.serve.recipe import Recipe, changed, load_recipe
from tessera.serve.recipe_hardware import GPUS, assumed
from tessera.serve.recipe_plan import Plan, as_data, misplaced, plan
from tessera.serve.signals import StopSignals
from tessera.serve.up import Supervisor

DRAIN, DRAIN_MARGIN, DRAIN_FLAG = 30.0, 10.0, "--drain-timeout"  # seconds; the first is the flag's default


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Brings it up. With `--plan`: 0 when every worker can run, else 2."""
    _together(options)
    device = [f"*.device={options.device}"] if options.device else []
    recipe = changed(load_recipe(options.recipe), [*device, *options.changes])
    if options.plan:
        return _plan(recipe, options.json)
    router = {"host": options.host, "port": options.port}
    if options.on == "slurm":
        slurm = import_module("tessera.serve.on_slurm")
        for path in slurm.write_job(recipe, router, options.job_dir or Path("job")):
            say(f"wrote {path}")
        return 0
    if options.on == "ray":
        cluster = _on_ray().connect(environ)
        return _up(deploy(recipe, cluster.site(recipe), router), cluster, options)
    plans = [plan(role, None) for role in recipe.roles]
    if wrong := [_named(found, conflict) for found in plans for conflict in found.conflicts]:
        raise ConfigError(wrong)
    gpus = max((_gpus(found) for found in plans), default=0)
    seen = environ.get(DEVICES)
    devices = numbered(gpus) if seen is None else tuple(seen.split(","))[:gpus]
    site = Site(host=lambda node: "127.0.0.1", port=free_port, gpus=devices)
    return _up(deploy(recipe, site, router), Here(environ), options)


def _together(options: Namespace) -> None:
    """Options that mean nothing without others are refused, not passed over."""
    wrong = []
    if options.json and not options.plan:
        wrong.append(Conflict(("--json", "no --plan"), "only a plan is printed as JSON", "Add --plan."))
    if options.job_dir is not None and (options.on != "slurm" or options.plan):
        reason = "only --on slurm writes a job file"
        wrong.append(Conflict((f"--job-dir {options.job_dir}",), reason, "Add --on slurm, or leave it out."))
    if wrong:
        raise ConfigError(wrong)


def _on_ray() -> Any:
    try:
        return import_module("tessera.serve.on_ray")  # an extra
    except ImportError as error:
        remedy = "Install the extra: pip install 'tessera-llm[ray]', or use --on here or --on slurm."
        raise ConfigError([Conflict(("--on ray",), f"Ray is not installed ({error})", remedy)]) from None


def _gpus(found: Plan) -> int:
    """GPUs of this host that a role may count on."""
    if found.resolved is None or found.resolved.config.mesh.device != "cuda":
        return 0
    count: int = import_module("tessera.run.hardware").measure("cuda").count
    return count


def _named(found: Plan, conflict: Conflict) -> Conflict:
    first, *more = conflict.flags
    return Conflict((f"{found.role.name}: {first}", *more), conflict.reason, conflict.remedy)


def _up(deployment: Deployment, starter: Starter, options: Namespace) -> int:
    logs.configure("warning")
    with screen(options.log_dir) as view:
        uvloop.run(_supervise(deployment, starter, options, view))
    return 0


async def _supervise(deployment: Deployment, starter: Starter, options: Namespace, view: Screen) -> None:
    signals = StopSignals()  # the second one ends this process at once, and the kernel the others with it
    made = Supervisor(
        deployment,
        starter,
        view,
        options.on_failure,
        patience=options.start_timeout,
        drain=_drain(deployment) + DRAIN_MARGIN,
        restarts=options.max_restarts,
    )
    await made.run(signals)


def _drain(deployment: Deployment) -> float:
    """The longest time that a process takes to end in order, as its command line says it."""
    longest = DRAIN
    for process in (*deployment.workers, deployment.router):
        if DRAIN_FLAG in process.command:
            longest = max(longest, float(process.command[process.command.index(DRAIN_FLAG) + 1]))
    return longest


def _plan(recipe: Recipe, as_json: bool) -> int:
    hardware, told = _hardware(recipe)
    recipe = recipe if hardware is None else across_hosts(recipe)
    plans = [plan(role, None if _on_cpu(role.flags) else hardware) for role in recipe.roles]
    wrong = misplaced(recipe, hardware)
    can = all(found.resolved is not None for found in plans) and not wrong
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
