"""`tessera up`: all processes of a recipe, until a signal; or its plan; or its job files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop

from tessera.commands.options import ROUTER, parse
from tessera.commands.terminal import say
from tessera.commands.upview import Screen, screen
from tessera.core.errors import ConfigError, Conflict
from tessera.serve import logs
from tessera.serve.deployment import DEVICES, Deployment, Site, deploy, numbered, words
from tessera.serve.here import Here, Starter
from tessera.serve.recipe import changed, load_recipe
from tessera.serve.recipe_check import checked
from tessera.serve.signals import StopSignals
from tessera.serve.up import Supervisor

DRAIN, DRAIN_MARGIN, DRAIN_FLAG = 30.0, 10.0, "--drain-timeout"  # seconds; the first is the flag's default


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Brings it up. With `--plan`: 0 when every worker can run, else 2."""
    _together(options)
    device = [f"*.device={options.device}"] if options.device else []
    recipe = changed(load_recipe(options.recipe), [*device, *options.changes])
    parse(ROUTER, words(recipe.router))  # what the router would refuse, once all workers are there
    if options.plan:
        shown: int = import_module("tessera.commands.upplan").show(recipe, options.json, options.on == "here")  # torch
        return shown
    router = {"host": options.host, "port": options.port}
    if options.on == "slurm":
        slurm = import_module("tessera.serve.on_slurm")
        for path in slurm.write_job(recipe, router, options.job_dir or Path("job")):
            say(f"wrote {path}")
        return 0
    if options.on == "ray":
        cluster = _on_ray().connect(environ)
        return _up(deploy(recipe, cluster.site(recipe), router), cluster, options)
    found = checked(recipe)
    if found.conflicts:
        raise ConfigError(found.conflicts)
    seen = environ.get(DEVICES)
    devices = numbered(found.gpus) if seen is None else tuple(seen.split(","))[: found.gpus]
    here = Here(environ)
    site = Site(host=lambda node: "127.0.0.1", port=here.port, gpus=devices)
    deployment = deploy(recipe, site, router)
    here.claim([*deployment.workers, deployment.router])
    return _up(deployment, here, options)


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
